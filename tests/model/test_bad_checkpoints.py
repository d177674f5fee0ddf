"""What a user sees whose checkpoint is not whole: one line that says what, where, how to mend it; exit code 2."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from llava_sv import cli
from llava_sv.model.builders import build_model
from tests.model.checkpoints import make_clip, make_llm


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return str(make_llm(root / "llm")), str(make_clip(root / "clip"))


@pytest.fixture
def folder(bases, tmp_path):
    for part in build_model("llava", *bases, skip_vision={"num_retained": 4, "num_skipped": 5}, conv_template="plain"):
        part.save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def rewrite_config(folder, old: str, new: str) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


DAMAGE = {
    "has no config.json": lambda f: (f / "config.json").unlink(),
    "malformed JSON at line 1": lambda f: (f / "config.json").write_text("{'a': 1}"),
    "lacks 1 key(s): model.norm.weight": lambda f: change_weights(f, lambda w: w.pop("model.norm.weight")),
    "1 key(s): model.extra": lambda f: change_weights(
        f, lambda w: w.update({"model.extra": w["model.norm.weight"].clone()})
    ),
    "weights cannot be read": lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"),
    "is more than the 16 patches": lambda f: rewrite_config(f, '"num_retained": 4', '"num_retained": 14'),
    "unknown selection 'best'": lambda f: rewrite_config(f, '"cls_similarity"', '"best"'),
    "unknown projector 'mlp'": lambda f: rewrite_config(f, '"mlp2x_gelu"', '"mlp"'),
    "unknown family 'lava'": lambda f: rewrite_config(f, '"mm_family": "llava"', '"mm_family": "lava"'),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_one_line_and_exit_code_2(folder, message, capfd):
    DAMAGE[message](folder)
    capfd.readouterr()
    assert cli.main(["chat", "--model-path", str(folder), "--device", "cpu", "--prompt", "is there a circle"]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert str(folder) in lines[0]
    assert "Traceback" not in lines[0]


def test_flash_attention_where_there_is_none(folder, capfd):
    arguments = ["--attn-implementation", "flash_attention_2", "--device", "cpu", "--prompt", "is there a circle"]
    assert cli.main(["chat", "--model-path", str(folder), *arguments]) == 2
    assert "pip install 'llava-sv[flash]'" in capfd.readouterr().err
