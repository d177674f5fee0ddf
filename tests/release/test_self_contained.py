"""Code beside a checkpoint: what is written, and that transformers alone answers with it bit for bit as the package."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

import llava_sv
from llava_sv.errors import UserError
from llava_sv.generation import generate, load_for_inference, make_batch, user_turn
from llava_sv.model.builders import build_model
from llava_sv.model.language_model.decoders import DECODERS
from llava_sv.release import self_contained
from llava_sv.release.self_contained import ENTRY, NEEDED, PREFIX, code_of, write_code
from tests.model.checkpoints import LLMS, make_clip, make_llm, make_siglip
from tests.release import without_package

FAMILIES = {
    "llava": {},
    "llava_hd": dict(image_aspect_ratio="pad"),
    "cos": dict(mm_projector_type="cos", cos_windows=[4, 2, 1], cos_queries=[1, 4, 16], mm_vision_image_size=32),
}
BUDGETS = {
    "llava": {"num_retained": 4, "num_skipped": 5},
    "llava_hd": {"num_retained": 16, "num_skipped": 8},
    "cos": {"num_retained": 5, "num_skipped": 6},
}
FEW = [
    ("llama", "llava", "clip"),
    ("mistral", "llava_hd", "clip"),
    ("qwen2", "cos", "clip"),
    ("qwen3", "llava", "siglip"),
]
REST = [(kind, family, "clip") for kind in LLMS for family in FAMILIES if (kind, family, "clip") not in FEW]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Here as in the child: sums that several threads share need not be equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    made = {kind: str(make_llm(root / kind, kind=kind)) for kind in LLMS}
    return {**made, "clip": str(make_clip(root / "clip")), "siglip": str(make_siglip(root / "siglip"))}


@pytest.fixture(scope="module")
def released(bases, tmp_path_factory):
    """(decoder, family, encoder) -> a folder as it is released: whole, with processor and code."""
    root, made = tmp_path_factory.mktemp("released"), {}

    def release(kind, family, tower):
        if (kind, family, tower) in made:
            return made[kind, family, tower]
        folder = root / f"{kind}-{family}.{tower}"
        selection = {"selection": "pool_attention"} if tower == "siglip" else {}
        torch.manual_seed(0)
        tokenizer, model, image_processor = build_model(
            family, bases[kind], bases[tower],
            skip_vision={**BUDGETS[family], **selection}, conv_template="vicuna_v1", **FAMILIES[family],
        )  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        for part in (model, tokenizer, image_processor):
            part.save_pretrained(folder)
        AutoProcessor.from_pretrained(folder).save_pretrained(folder)
        write_code(folder)
        made[kind, family, tower] = folder
        return folder

    return release


def of_package(folder):
    """The package's own answers, by `load_for_inference` and `make_batch`."""
    assistant = load_for_inference(str(folder), device="cpu")
    red, blue, wide = (
        part["image"] for message in without_package.questions() for turn in message for part in turn["content"]
        if isinstance(part, dict) and part["type"] == "image"
    )  # fmt: skip
    turns = [
        [user_turn("is it red?", 1)],
        [
            user_turn("a circle</s> <image> is", 2),
            {"from": "gpt", "value": "blue"},
            {"from": "human", "value": "yes"},
        ],
    ]
    batch = make_batch(assistant, turns, [[red], [blue, wide]])
    with torch.no_grad():
        found = {
            "logits": assistant.model(
                batch.input_ids, attention_mask=batch.attention_mask, images=batch.images, image_sizes=batch.image_sizes
            ).logits,
            "input_ids": batch.input_ids,
            "images": batch.images,
        }
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return {**found, **{level: generate(assistant, batch, skip_kv=level, **options) for level in ("none", "skipped")}}


def assert_equal(found, expected):
    for name in ("input_ids", "logits", "none", "skipped"):
        assert torch.equal(found[name], expected[name]), name
    assert all(torch.equal(a, b) for a, b in zip(found["images"], expected["images"], strict=True))
    assert all(isinstance(text, str) for text in found["text"])


def run(what, folders, tmp_path):
    """`without_package` in a process that sees neither this one's path nor its folder, offline."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    out = tmp_path / "answers.pt"
    # -I leaves PYTHONPATH unread: what the tests themselves run on is put in front of the child's path by hand
    path = [entry for entry in sys.path if entry and not (Path(entry) / "llava_sv").is_dir()]
    if what == "both":
        path.append(str(Path(llava_sv.__file__).parents[1]))
    code = (
        f"import runpy, sys; sys.path[:0] = {path!r}; runpy.run_path({without_package.__file__!r}, run_name='__main__')"
    )
    words = [sys.executable, "-I", "-c", code, what, out, *folders]
    done = subprocess.run(
        list(map(str, words)), cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert "to instantiate a model of type" not in done.stderr, "transformers knows the config by the folder's code"
    return torch.load(out, weights_only=True)


# -- in processes of their own -----------------------------------------------------------------------------------------


def test_without_the_package_every_decoder_and_family_answers_alike(released, tmp_path):
    folders = [released(*case) for case in FEW]
    found = run("without", folders, tmp_path)
    assert [("trust_remote_code=True" in said, "custom code" in said) for said in found["refused"]] == [
        (True, True)
    ] * 3
    assert "llava_sv" not in found["imported"]
    for folder, ours in zip(folders, found["without"], strict=True):
        assert_equal(ours, of_package(folder))
        assert {module.split(".")[0] for module in ours["modules"]} == {"transformers_modules"}
        assert len({module.rpartition(".")[0] for module in ours["modules"]}) == 1, "one copy of the code"


def test_code_and_package_in_one_process(released, tmp_path):
    folder = released(*FEW[0])
    found = run("both", [folder], tmp_path)
    expected = of_package(folder)
    for how in ("without", "package", "package, flag"):
        assert_equal(found[how][0], expected)
    assert found["without"][0]["modules"][0].startswith("transformers_modules.")
    # saved by transformers, it is whole: the same code under the same names, all of it beside
    saved = tmp_path / "answers.pt.saved"
    for name in {path.name for path in folder.iterdir() if path.suffix == ".py"}:
        assert (saved / name).read_bytes() == (folder / name).read_bytes()
    for name in ("config.json", "processor_config.json"):
        assert json.loads((saved / name).read_text())["auto_map"] == json.loads((folder / name).read_text())["auto_map"]
    assert len(set(found["saved again"])) == 1, "one copy of the code"
    # imported, the package goes first, flag or no flag: the folder's code is not run
    assert all(
        module.startswith("llava_sv.") for how in ("package", "package, flag") for module in found[how][0]["modules"]
    )


@pytest.mark.slow
def test_all_others_too(released, tmp_path):
    folders = [released(*case) for case in REST]
    found = run("without", folders, tmp_path)
    for folder, ours in zip(folders, found["without"], strict=True):
        assert_equal(ours, of_package(folder))


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECODERS)
def test_files_are_the_packages_but_for_imports(kind):
    files = code_of(DECODERS[kind])
    root = Path(llava_sv.__file__).parent
    assert len(files) < 45
    for name, written in files.items():
        if name == f"{ENTRY}.py":
            continue
        notice, _, text = written.partition("\n\n")
        path = Path(llava_sv.__file__).parents[1] / re.search(r"from (llava_sv/\S+\.py); do not edit", notice)[1]
        assert name == PREFIX + path.relative_to(root).with_suffix("").as_posix().replace("/", "_") + ".py"
        assert "Apache License, Version 2.0" in notice
        assert (
            f"Generated by llava_sv {llava_sv.__version__} from llava_sv/{path.relative_to(root).as_posix()}" in notice
        )
        ours, theirs = text.splitlines(), path.read_text(encoding="utf-8").splitlines()
        changed = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
        assert all(
            a.lstrip().startswith(f"from .{PREFIX}") and b.lstrip().startswith("from llava_sv") for a, b in changed
        )
    assert files == code_of(DECODERS[kind])


@pytest.mark.parametrize("kind", DECODERS)
def test_files_import_what_a_reader_has_and_one_another(kind):
    files = code_of(DECODERS[kind])
    outside = set()
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                outside |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                outside.add(node.module.split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                assert (node.level, f"{node.module}.py" in files) == (1, True), f"{name}: {node.module}"
    assert outside - set(sys.stdlib_module_names) <= set(NEEDED)
    others = {other for other in DECODERS if other != kind}
    assert not [name for name in files for other in others if f"llava_{other}" in name], "one decoder's code only"
    assert not [
        name for name in files if any(word in name for word in ("train", "checkpoint_io", "partitioned", "lora"))
    ]


def test_written_again_it_is_the_same(released):
    folder = released(*FEW[0])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / f"{PREFIX}of_an_earlier_version.py").write_bytes(before[f"{PREFIX}errors.py"])
    (folder / f"{PREFIX}of_somebody.py").write_text("x = 1\n")
    names = write_code(folder)
    (folder / f"{PREFIX}of_somebody.py").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names == sorted(names)
    assert {name for name in before if name.endswith(".py")} | {"config.json", "processor_config.json"} == set(names)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"] == f"{ENTRY}.LlavaLlamaForCausalLM"
    models = {"AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoProcessor", *models}
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_an_old_transformers_is_named(monkeypatch):
    text = code_of(DECODERS["llama"])[f"{ENTRY}.py"]
    asked = re.search(r"transformers>=[\d.]+", (Path(__file__).parents[2] / "pyproject.toml").read_text())[0]
    (needed,) = re.findall(r"^require_version.*$", text, flags=re.M)
    assert f'"{asked}"' in needed
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.1")
    with pytest.raises(ImportError, match=r"transformers>=5\.13 is required .* but found transformers==4\.57\.1"):
        exec(text.partition("from .")[0], {})


def test_without_a_processor_it_is_left_out(released, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((released(*FEW[0]) / name).read_bytes())
    assert "processor_config.json" not in write_code(tmp_path)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "llava", "llava_qwen", None])
def test_what_is_no_checkpoint_of_this_project(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else []))
    with pytest.raises(
        UserError, match="is not of this project's layout; model_type must be llava_llama, llava_mistral"
    ):
        write_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_checkpoint_that_names_its_encoder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_vision_tower": "x"}))
    with pytest.raises(UserError, match=r"names its encoder instead of holding it \(vision_config is empty\)"):
        write_code(tmp_path)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import llava_sv.errors\n", "line 1: imports a module of the package by `import`"),
        ("import os\nfrom . import errors\n", "line 2: imports relatively"),
        ("from llava_sv import errors\n", "line 1: imports a module whole"),
        ("from llava_sv.errors  import UserError\n", "line 1: write it as `from llava_sv.errors import ...` on one"),
    ],
)
def test_imports_that_cannot_be_written_so(monkeypatch, source, why):
    monkeypatch.setattr(self_contained, "source_of", lambda module: source)
    with pytest.raises(ValueError, match=why):
        self_contained.flattened("llava_sv.x")


def test_imports_inside_functions_and_over_lines(monkeypatch):
    source = "def f():\n    from llava_sv.errors import (\n        UserError,\n    )\n    # from llava_sv\n"
    monkeypatch.setattr(self_contained, "source_of", lambda module: source)
    text = self_contained.flattened("llava_sv.x").partition("\n\n")[2]
    assert text == source.replace("from llava_sv.errors", "from .sv_errors")


def test_two_modules_of_one_name(monkeypatch):
    monkeypatch.setattr(self_contained, "closure", lambda roots: {"llava_sv.data_stats", "llava_sv.data.stats"})
    with pytest.raises(ValueError, match="two modules would be sv_data_stats"):
        code_of(DECODERS["llama"])
