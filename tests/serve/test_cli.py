"""`llava-sv chat`: one question, a conversation, two images, and mistakes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_sv import cli
from llava_sv.conversation import get_template, render
from llava_sv.generation import load_for_inference
from llava_sv.mm_utils import load_image, process_images, tokenizer_image_token
from llava_sv.serve.cli import Chat
from tests.checkpoints import SKIP, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("chat") / "tiny-skip", SKIP, seed=3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in (("red.png", (220, 30, 30)), ("blue.jpg", (20, 40, 220))):
        Image.new("RGB", (48, 40), colour).save(folder / name)
    return folder


def expected(checkpoint, turns, images, new_tokens):
    """The answer by way of the model's own interface, without any of chat's code."""
    assistant = load_for_inference(str(checkpoint), device="cpu")
    prompt = render(get_template("llama_3"), turns, add_generation_prompt=True).text
    ids = tokenizer_image_token(prompt, assistant.tokenizer, return_tensors="pt")[None]
    pixels = process_images([load_image(p) for p in images], assistant.image_processor, assistant.model.config)
    stop = assistant.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    with torch.inference_mode():
        out = assistant.model.generate(
            ids, images=pixels, max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop
        )
    return assistant.tokenizer.decode(out[0], skip_special_tokens=True).strip()


def chat(checkpoint, *arguments):
    return cli.main(["chat", "--model-path", str(checkpoint), "--device", "cpu", "--max-new-tokens", "8", *arguments])


def test_one_question_about_two_images(checkpoint, pictures, capsys):
    files = [str(pictures / "red.png"), str(pictures / "blue.jpg")]
    assert chat(checkpoint, "--image-file", files[0], "--image-file", files[1], "--prompt", "What colour?") == 0
    turns = [{"from": "human", "value": "<image>\n<image>\nWhat colour?"}]
    assert capsys.readouterr().out.strip() == expected(checkpoint, turns, files, 8)


def test_a_conversation_remembers_until_reset(checkpoint, pictures, capsys, monkeypatch):
    image = str(pictures / "red.png")
    monkeypatch.setattr("sys.stdin", io.StringIO("What colour?\n\nSure?\n/reset\nWhat colour?\n/exit\nnever\n"))
    assert chat(checkpoint, "--image-file", image) == 0
    out = capsys.readouterr().out
    assert out.count("(forgotten)") == 1
    first = [{"from": "human", "value": "<image>\nWhat colour?"}]
    answer = expected(checkpoint, first, [image], 8)
    second = expected(
        checkpoint, [*first, {"from": "gpt", "value": answer}, {"from": "human", "value": "Sure?"}], [image], 8
    )
    before, after = out.split("(forgotten)")
    assert [line.strip() for line in before.strip().split("\n") if line.strip()] == [
        line.strip() for line in f"{answer}\n{second}".split("\n") if line.strip()
    ]
    assert after.strip() == answer


def test_streaming_and_beams_and_sampling(checkpoint, pictures, capsys):
    image = ["--image-file", str(pictures / "red.png"), "--prompt", "What colour?"]
    assert chat(checkpoint, *image, "--num-beams", "2") == 0
    assert chat(checkpoint, *image, "--temperature", "0.7", "--top-p", "0.9", "--skip-kv", "none") == 0
    assert capsys.readouterr().out.strip()


def test_an_image_mark_in_a_message_is_only_words(checkpoint):
    assistant = load_for_inference(str(checkpoint), device="cpu")
    talk = Chat(assistant, [], {"max_new_tokens": 2, "num_beams": 1, "do_sample": False}, None)
    talk.ask("What does <image> mean?")
    assert talk.turns[0]["value"] == "What does < image> mean?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-file", "gone.png"], "error: no such image file: gone.png"),
        (["--image-file", "gone.png", "--image-file", "too.png"], "error: no such image file: gone.png, too.png"),
        (["--image-file", __file__], "cannot be read"),
        (["--top-p", "0.9"], "error: --top-p samples, and --temperature is 0; give a temperature above 0"),
        (["--temperature", "-1"], "error: --temperature must be 0 or more, got -1.0"),
        (["--max-new-tokens", "0"], "error: --max-new-tokens must be 1 or more, got 0"),
        (["--num-beams", "0"], "error: --num-beams must be 1 or more, got 0"),
        (["--model-path", "nowhere"], "error: no such checkpoint folder: nowhere; train one"),
        (["--model-path", "tests/nowhere"], "error: no such checkpoint folder: tests/nowhere"),
        (["--model-path", "/a/b/nowhere"], "error: no such checkpoint folder: /a/b/nowhere"),
        (["--conv-template", "vicuna"], "unknown conversation template 'vicuna'; known: plain, v1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(checkpoint, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert chat(checkpoint, "--prompt", "hello", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_cuda_device_that_is_not_there_is_said(checkpoint, capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    assert chat(checkpoint, "--device", "cuda", "--prompt", "hello") == 2
    assert "no CUDA GPU is usable here" in capsys.readouterr().err
