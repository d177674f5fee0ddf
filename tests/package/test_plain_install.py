"""The wheel in an environment that has what it declares and nothing else: who loads and asks needs no more."""

from __future__ import annotations

import io
import json
import subprocess

import pytest
import sentencepiece
from PIL import Image

import llava_sv
from llava_sv import cli
from tests.checkpoints import SKIP, save_checkpoint
from tests.package.plain_environment import clean, make, run_all
from tests.tokenizers_util import CORPUS

PROMPT = "What is this?"
TRAIN = 'which a plain install leaves out: pip install "llava-sv[train]"\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder far from the tree, with a checkpoint and a picture."""
    folder = tmp_path_factory.mktemp("elsewhere")
    save_checkpoint(folder / "model", SKIP)
    Image.linear_gradient("L").convert("RGB").resize((60, 40)).save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def binaries(wheel, tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain") / "env", wheel)


QUESTION = ["chat", "--model-path", "model", "--image-file", "image.png", "--prompt", PROMPT, "--max-new-tokens", "12"]


def test_chat_of_the_installed_command_answers_as_this_tree_does(binaries, place, monkeypatch, capsys):
    command = [str(binaries / "llava-sv"), *QUESTION, "--device", "cpu"]
    done = subprocess.run(command, cwd=place, env=clean(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(place)
    assert cli.main([*QUESTION, "--device", "cpu"]) == 0
    assert done.stdout == capsys.readouterr().out
    assert done.stdout.strip()


def test_the_installed_command_knows_its_version(binaries, place):
    command = [str(binaries / "llava-sv"), "--version"]
    version = subprocess.run(command, cwd=place, env=clean(), capture_output=True, text=True, timeout=60, check=True)
    assert version.stdout == f"llava-sv {llava_sv.__version__}\n"


AUTO = """
import importlib.util, pathlib, sys
import llava_sv, torch
from llava_sv.extras import EXTRA_OF
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
assert pathlib.Path(llava_sv.__file__).is_relative_to(sys.prefix), llava_sv.__file__
assert pathlib.Path(llava_sv.__file__).with_name("py.typed").is_file()
model = AutoModelForCausalLM.from_pretrained("model")
ids = AutoTokenizer.from_pretrained("model")("a b c", return_tensors="pt").input_ids
print(AutoConfig.from_pretrained("model").model_type, bool(model(ids).logits.isfinite().all()))
print([name for name in EXTRA_OF if importlib.util.find_spec(name)])
print(AutoTokenizer.from_pretrained("llama")("the red square").input_ids)
"""


def llama_tokenizer(folder):
    """A tokenizer as LLaMA's and LLaVA's folders have it: SentencePiece's file alone. Returns ids of a sentence."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=80, model_type="bpe", minloglevel=2
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    own = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    return [own.bos_id(), *own.encode("the red square")]


WORK = {
    "doctor": "deepspeed, datasets, pyarrow, matplotlib, tensorboard, wandb: what training, data files and charts take "
    'beside the rest. Get it: pip install "llava-sv[train]"',
    "data toy --output toy --train 2 --bench 6 --fine-train 0 --fine-bench 0": "bench",
    "eval --model-path model --task toy --data-path toy --device cpu --limit 2 --max-new-tokens 2": "existence",
    "flops --model-path model": "FLOPs",
    "train --help": "usage: llava-sv train",
}
"""Commands that work without any extra -> what they print."""

WANTING = {
    "train --model_name_or_path model": "this needs pyarrow, ",
    "train --deepspeed zero.json --report_to wandb": "this needs wandb, ",
    "data mix llava-665k --list": "this needs pyarrow, ",
    "data check records.json": "this needs pyarrow, ",
    "data stats records.json --plots plots": "this needs pyarrow, ",
    "analyze flops-share --output figures": "this needs matplotlib, ",
    "analyze ffn-impact --model-path model --image-folder . --output figures": "this needs matplotlib, ",
    "bench sweep --png sweep.png": "this needs matplotlib, ",
    "bench data": "this needs pyarrow, ",
}
"""Commands that end in one line about the extra -> what it begins with."""


@pytest.fixture(scope="module")
def asked(binaries, place):
    """(what AUTO printed, ids that it must print, what each of WORK and WANTING ended in)."""
    ids = llama_tokenizer(place / "llama")
    (_, printed, _), *done = run_all(binaries, place, [line.split() for line in [*WORK, *WANTING]], AUTO)
    return printed, ids, done


def test_the_auto_classes_load_a_checkpoint_and_a_tokenizer_of_sentencepiece(asked):
    printed, ids, _ = asked
    assert printed.splitlines() == ["llava_llama True", "[]", str(ids)]


def test_what_works_without_extras_and_what_says_which_one_it_needs(asked, place):
    done = asked[2]
    for (line, said), (code, out, err) in zip({**WORK, **WANTING}.items(), done, strict=True):
        if line in WORK:
            assert (code, said in out) == (0, True), f"{line}: {code}, {out}{err}"
            continue
        assert code == 2, f"{line}: {code}, {out}{err}"
        assert said + TRAIN in err, f"{line}: {err}"
        if not line.startswith("train --"):  # training lists all that is missing
            assert err == f"error: {said}{TRAIN}"
    assert not (place / "figures").exists()


@pytest.mark.slow
def test_the_lighter_extra_is_enough_for_data_and_figures(wheel, place, tmp_path_factory):
    binaries = make(tmp_path_factory.mktemp("lighter") / "env", wheel, extra="eval")
    lines = [
        "data toy --output drawn --train 12 --bench 6 --fine-train 0 --fine-bench 0",
        "data check drawn/sft.json --image-folder drawn/images",
        "data index drawn/sft.json",
        "data stats drawn/sft.json --checkpoint model --plots plots",
        "data shard drawn/sft.json --image-folder drawn/images --output shards",
        "data mix llava-665k --list",
        "analyze flops-share --output figures-of-flops",
    ]
    done = run_all(binaries, place, [line.split() for line in lines])[1:]
    for line, (code, out, err) in zip(lines, done, strict=True):
        assert code == 0, f"{line}: {code}, {out}{err}"
    _, (code, _, err) = run_all(binaries, place, [["train", "--deepspeed", "zero.json"]])
    assert (code, "this needs deepspeed, " + TRAIN in err) == (2, True)
