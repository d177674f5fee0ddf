"""No code of a checkpoint runs: pickles that would write a file, and Python files that an `auto_map` names, are put
wherever something is loaded. One line and exit code 2, and the file is never written."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_sv import cli
from llava_sv.errors import UserError
from llava_sv.model.builder import load_pretrained_model
from llava_sv.model.builders import build_model
from llava_sv.model.builders.tokenizer import load_tokenizer
from llava_sv.model.language_model.causal_lm import LlavaCausalLM
from llava_sv.release import from_llava
from llava_sv.release.weights import entries_of
from llava_sv.train import universal
from llava_sv.train.pickles import TRUST, check_pickles, read_restricted
from llava_sv.train.train import main as train
from tests.model import liuhaotian
from tests.train.tiny import World

PACKAGE = Path(__file__).parents[1] / "llava_sv"


class Evil:
    """What runs where this is unpickled: it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "code of the checkpoint ran")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return liuhaotian.make_encoder(tmp_path_factory.mktemp("encoder") / "clip")


@pytest.fixture
def mark(tmp_path):
    """Never written, when loading is safe; the oracle writes one to show that the pickle works."""
    proof = tmp_path / "proof"
    torch.save({"a": Evil(proof)}, tmp_path / "proof.bin")
    torch.load(tmp_path / "proof.bin", weights_only=False)
    assert proof.exists()
    return tmp_path / "ran"


def poison(file: Path, mark: Path, keep: bool = True) -> None:
    """Add the pickle to a file of tensors, which stay as they are."""
    values = torch.load(file, weights_only=True) if keep and file.exists() else {}
    torch.save({**values, "model.layers.0.extra": Evil(mark)}, file)


def chat(capfd, *words) -> str:
    """The one line that it ends with."""
    capfd.readouterr()
    assert cli.main(["chat", *map(str, words), "--device", "cpu", "--prompt", "what is it"]) == 2
    err = capfd.readouterr().err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "Traceback" not in err
    return line


def v15(folder: Path, clip: Path) -> Path:
    liuhaotian.make_v15(folder, clip)
    return folder


def test_a_whole_checkpoint_in_shards(clip, tmp_path, mark, capfd):
    folder = v15(tmp_path / "llava", clip)
    poison(folder / "pytorch_model-00002-of-00002.bin", mark)
    assert "cannot be read" in chat(capfd, "--model-path", folder)
    with pytest.raises(UserError, match="cannot be read"):
        from_llava.read(folder)
    assert not mark.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_whole_checkpoint_in_one_file(clip, tmp_path, mark, capfd, legacy):
    """LLaVA's layout and this project's; torch's two file formats."""
    folder = v15(tmp_path / "llava", clip)
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), device="cpu")
    ours = tmp_path / "ours"
    for part in (model, tokenizer, processor):
        part.save_pretrained(ours)
    (ours / "model.safetensors").unlink()
    shutil.copytree(ours, tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text((folder / "config.json").read_text())
    for target in (ours, tmp_path / "foreign"):
        weights = {**model.state_dict(), "model.extra": Evil(mark)}
        torch.save(weights, target / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        assert "cannot be read" in chat(capfd, "--model-path", target)
    assert not mark.exists()


def test_a_projector(clip, tmp_path, mark, capfd):
    base = liuhaotian.make_base(tmp_path / "vicuna")
    folder = tmp_path / "projector"
    liuhaotian.make_projector(folder, clip)
    poison(folder / "mm_projector.bin", mark)
    assert "mm_projector.bin: cannot be read" in chat(capfd, "--model-path", folder, "--model-base", base)
    with pytest.raises(UserError, match=r"mm_projector\.bin: cannot be read"):
        from_llava.read(folder, base=str(base))
    with pytest.raises(UserError, match=r"mm_projector\.bin: cannot be read"):
        build_model("llava", str(base), str(clip), pretrain_mm_mlp_adapter=str(folder / "mm_projector.bin"))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_adapters(clip, tmp_path, mark, capfd, name):
    base = liuhaotian.make_base(tmp_path / "vicuna")
    liuhaotian.make_lora(tmp_path / "lora", clip, str(base))
    poison(tmp_path / "lora" / name, mark)
    assert f"{name}: cannot be read" in chat(capfd, "--model-path", tmp_path / "lora")
    assert cli.main(["convert", "--merge-lora", str(tmp_path / "lora"), "--output", str(tmp_path / "out")]) == 2
    assert not mark.exists()


def test_a_vision_tower_and_a_language_model(clip, tmp_path, mark, capfd):
    folder = v15(tmp_path / "llava", clip)
    bad = tmp_path / "clip"
    bad.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(clip / name, bad)
    poison(bad / "pytorch_model.bin", mark)
    assert f"checkpoint {bad}: weights cannot be read" in chat(capfd, "--model-path", folder, "--vision-tower", bad)
    base = liuhaotian.make_base(tmp_path / "vicuna")
    (base / "model.safetensors").unlink()
    poison(base / "pytorch_model.bin", mark)
    with pytest.raises(UserError, match="weights cannot be read"):
        build_model("llava", str(base), str(clip))
    assert not mark.exists()


def test_a_file_that_is_a_bare_pickle(clip, tmp_path, mark, capfd):
    """Not torch's format at all."""
    folder = v15(tmp_path / "llava", clip)
    for file in folder.glob("pytorch_model-*.bin"):
        file.write_bytes(pickle.dumps(Evil(mark)))
    assert "cannot be read" in chat(capfd, "--model-path", folder)
    with pytest.raises(UserError, match="cannot be read"):
        entries_of(folder / "pytorch_model-00001-of-00002.bin")
    assert not mark.exists()


def remote_code(folder: Path, mark: Path) -> None:
    """Python files and the `auto_map`s that name them, in every file that may have one."""
    code = f"from pathlib import Path\nPath({str(mark)!r}).write_text('ran')\n"
    names = {"AutoConfig": "C", "AutoModel": "M", "AutoModelForCausalLM": "M", "AutoTokenizer": ["T", "T"]}
    names |= {"AutoProcessor": "P", "AutoImageProcessor": "I", "AutoModelForImageTextToText": "M"}
    auto_map = {k: [f"evil.{x}" for x in v] if isinstance(v, list) else f"evil.{v}" for k, v in names.items()}
    (folder / "evil.py").write_text(code + "class C: pass\nM = T = P = I = C\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        file = folder / name
        values = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(values | {"auto_map": auto_map}))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code + "def generate(model, **kwargs): return None\n")


@pytest.mark.parametrize("layout", ["llava", "sv"])
def test_an_auto_map_runs_nothing(clip, tmp_path, mark, layout, capfd):
    folder = v15(tmp_path / "llava", clip)
    expected = load_tokenizer(str(folder))("a red circle").input_ids
    if layout == "sv":
        parts = load_pretrained_model(str(folder), device="cpu")[:3]
        folder = tmp_path / "ours"
        for part in (parts[1], parts[0], parts[2]):
            part.save_pretrained(folder)
    remote_code(folder, mark)
    tokenizer, *_ = load_pretrained_model(str(folder), device="cpu")
    assert tokenizer("a red circle").input_ids == expected
    words = ["chat", "--model-path", str(folder), "--device", "cpu", "--prompt", "what is it", "--max-new-tokens", "2"]
    assert cli.main(words) == 0
    if layout == "sv":  # with the flag, too: the package's classes go before the folder's
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert processor.tokenizer("a red circle").input_ids == expected
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        assert model.generate.__func__ is LlavaCausalLM.generate
    assert not mark.exists()


def test_an_auto_map_of_a_base_runs_nothing(clip, tmp_path, mark):
    """A language model and an encoder that name code: theirs is known here, and that is what runs."""
    base = liuhaotian.make_base(tmp_path / "vicuna")
    tower = shutil.copytree(clip, tmp_path / "clip")
    for folder in (base, tower):
        remote_code(folder, mark)
    build_model("llava", str(base), str(tower))
    assert not mark.exists()


def test_a_base_of_unknown_kind_is_a_line(clip, tmp_path, mark):
    base = liuhaotian.make_base(tmp_path / "vicuna")
    remote_code(base, mark)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"model_type": "evil"}))
    with pytest.raises(UserError, match=r"cannot read its config\.json"):
        build_model("llava", str(base), str(clip))
    assert not mark.exists()


def test_training_reads_no_code(tmp_path, mark, capsys):
    world = World(tmp_path)
    (world.llm / "model.safetensors").unlink()
    poison(world.llm / "pytorch_model.bin", mark)
    assert train(world.flags("sft", tmp_path / "out", "--max_steps", "1")) == 2
    assert "weights cannot be read" in capsys.readouterr().err
    assert not mark.exists()


# -- what DeepSpeed reads with the full unpickler ---------------------------------------------------------------------


def test_what_deepspeed_would_run_is_found_first(tmp_path, mark, monkeypatch):
    folder = tmp_path / "checkpoint-3" / "global_step3"
    folder.mkdir(parents=True)
    torch.save({"module": {"a": torch.ones(3)}, "step": 3}, folder / "mp_rank_00_model_states.pt")
    check_pickles(folder)
    torch.save({"optimizer_state_dict": Evil(mark)}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(UserError) as caught:
        check_pickles(folder.parent)
    (line,) = str(caught.value).splitlines()
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt: names " in line
    assert f"set {TRUST}=1" in line
    assert not mark.exists()
    monkeypatch.setenv(TRUST, "1")
    check_pickles(folder.parent)
    assert not mark.exists(), "it is DeepSpeed that reads it then"


def test_classes_that_deepspeed_writes_are_known(tmp_path):
    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    fragment = pytest.importorskip("deepspeed.utils.tensor_fragment")
    states = {
        "loss_scaler": scaler.LossScaler(scale=1.0),
        "dynamic": scaler.DynamicLossScaler(2.0**16, 2, 1000, 1.0, 1),
        "zero_stage": zero.ZeroStageEnum.weights,
        "where": [fragment.fragment_address(numel=3, start=0)],
        "values": torch.arange(3.0),
    }
    torch.save(states, tmp_path / "a_states.pt")
    check_pickles(tmp_path)
    read = read_restricted(tmp_path / "a_states.pt")
    assert read["zero_stage"] == 3
    assert read["dynamic"].cur_scale == 2.0**16
    assert read["where"] == states["where"]
    assert torch.equal(read["values"], states["values"])


def test_converting_to_universal_looks_first(tmp_path, mark, monkeypatch, capsys):
    shards = tmp_path / "checkpoint-3" / "global_step3"
    shards.mkdir(parents=True)
    torch.save({"optimizer_state_dict": Evil(mark)}, shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    monkeypatch.setattr(universal.checkpoint, "what_is_torn", lambda folder: None)
    monkeypatch.setattr(universal, "universal_of", lambda folder: None)
    monkeypatch.setattr(universal, "_run_deepspeed", lambda *_: pytest.fail("DeepSpeed was given the file"))
    assert cli.main(["convert", "--universal", str(tmp_path / "checkpoint-3")]) == 2
    assert "which no checkpoint needs and which reading would run" in capsys.readouterr().err
    assert not mark.exists()


# -- the source -------------------------------------------------------------------------------------------------------

PIPES = {"data/index_worker.py"}
"""Pickles between a process and the one that it started."""

ARGUMENTS = {"weights_only": False, "trust_remote_code": True, "allow_pickle": True}
"""Arguments that let a file run code, with the value that does."""

CALLS = {
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pd.read_pickle",
    "joblib.load",
    "dill.load",
}


def unsafe(call: ast.Call, pipes: bool) -> str | None:
    """What is wrong with a call, or None. Options that are passed through (`**options`) are the caller's."""
    name = ast.unparse(call.func)
    given = {word.arg: word.value for word in call.keywords}
    for argument, value in ARGUMENTS.items():
        if isinstance(given.get(argument), ast.Constant) and given[argument].value is value:
            return f"{argument}={value}"
    if name in CALLS or (name in ("pickle.load", "pickle.loads", "pickle.Unpickler") and not pipes):
        return name
    if name == "torch.load" and "weights_only" not in given:
        return "torch.load without weights_only"
    made = name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config"))
    if made and not {"trust_remote_code", None} & set(given):  # transformers would ask on the terminal, and wait
        return f"{name} without trust_remote_code=False"
    return None


def test_no_source_file_loads_unsafely():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            wrong = unsafe(node, name in PIPES) if isinstance(node, ast.Call) else None
            if wrong:
                found.append(f"{name}:{node.lineno}: {wrong}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("torch.load(path)", "torch.load without weights_only"),
        ("torch.load(path, weights_only=False)", "weights_only=False"),
        ("torch.load(path, weights_only=True)", None),
        ("AutoTokenizer.from_pretrained(path)", "AutoTokenizer.from_pretrained without trust_remote_code=False"),
        ("AutoConfig.from_pretrained(path, trust_remote_code=True)", "trust_remote_code=True"),
        ("AutoConfig.from_pretrained(path, **options)", None),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("pickle.loads(data)", "pickle.loads"),
        ("yaml.load(text)", "yaml.load"),
        ("model.eval()", None),
    ],
)
def test_what_counts_as_unsafe(line, wrong):
    assert unsafe(ast.parse(line, mode="eval").body, pipes=False) == wrong
