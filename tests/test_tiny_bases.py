"""The committed tiny bases: in Hugging Face format, small, and each good enough alone at what it is there for."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPModel, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_sv.conversation import get_template, render
from llava_sv.data.toy import conversation, scene_of
from llava_sv.data.toy_questions import CATEGORIES
from llava_sv.data.toy_scene import COLOURS, PLACES, SHAPES, WORDS, Scene, describe
from llava_sv.data.toy_scene import render as draw
from llava_sv.mm_utils import expand2square

TINY = Path(__file__).resolve().parent.parent / "playground" / "tiny"
LLM, CLIP = TINY / "llm", TINY / "clip"
NUM_RETAINED, NUM_SKIPPED = 16, 20


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LLM)


@pytest.fixture(scope="module")
def llm():
    return AutoModelForCausalLM.from_pretrained(LLM).eval()


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(CLIP).eval()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Fresh ones: no seed below zero trained a base, nor draws a data set by default."""
    return [scene_of(-7, "test", i) for i in range(128)]


@pytest.fixture(scope="module")
def pixels(scenes):
    processor = CLIPImageProcessorPil.from_pretrained(CLIP)
    fill = tuple(int(255 * m) for m in processor.image_mean)
    squares = [expand2square(draw(scene), fill) for scene in scenes]
    return processor(squares, return_tensors="pt")["pixel_values"]


def test_each_base_is_a_few_megabytes_and_loads_in_float32(llm, clip):
    for folder in (LLM, CLIP):
        assert sum(f.stat().st_size for f in folder.iterdir()) < 5_000_000
    assert llm.dtype == clip.dtype == torch.float32
    assert CLIPVisionModel.from_pretrained(CLIP).dtype == torch.float32


def test_skipping_saves_as_much_as_the_paper_counts(llm, clip):
    """Section 6.2: 4 N1 C^2 + 2 N1^2 C + 3 N2 C M, skipping over dense."""
    c, m = llm.config.hidden_size, llm.config.intermediate_size
    n = (clip.config.vision_config.image_size // clip.config.vision_config.patch_size) ** 2

    def flops(attention: int, ffn: int) -> int:
        return 4 * attention * c * c + 2 * attention * attention * c + 3 * ffn * c * m

    assert flops(NUM_RETAINED + NUM_SKIPPED, NUM_RETAINED) / flops(n, n) <= 0.33


def test_tokenizer_is_llama_3s_in_small(tokenizer, llm):
    ids = tokenizer("A red circle.").input_ids
    assert ids[0] == tokenizer.bos_token_id == llm.config.bos_token_id
    assert tokenizer("a", add_special_tokens=False).input_ids[0] != tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(ids[0]) == "<|begin_of_text|>"
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)
    assert len(tokenizer) == llm.config.vocab_size
    ends = json.loads((LLM / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|eot_id|>", "<|end_of_text|>"]
    for special in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"):
        assert len(tokenizer(special, add_special_tokens=False).input_ids) == 1


def test_tokenizer_encodes_any_text_and_toy_words_as_one(tokenizer):
    for text in ("Größe 北京 🙂\n\n  two  spaces\ttab", "What colour is the ring?"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    for word in (*COLOURS, *SHAPES, *WORDS, *{w for p in PLACES for w in p.split()}):
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word


def test_chat_template_writes_what_training_writes(tokenizer):
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "yes"}, {"from": "human", "value": "Why?"}]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[t["from"]], "content": t["value"]} for t in turns]
    ours = render(get_template("llama_3"), turns, add_generation_prompt=True).text
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert theirs.removeprefix(tokenizer.bos_token) == ours.removeprefix(tokenizer.bos_token)


@torch.no_grad()
def _answer(llm, tokenizer, prompts: list[str]) -> list[str]:
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, add_special_tokens=False, return_tensors="pt", padding=True)
    out = llm.generate(**batch, max_new_tokens=5)
    return [t.strip() for t in tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)]


def test_llm_answers_questions_about_scenes_in_words(llm, tokenizer, scenes):
    rng = random.Random(3)
    asked = [(c, s, q) for s in scenes[:40] for c, ask in CATEGORIES.items() if (q := ask(s, rng)) is not None]
    prompts = []
    for _, scene, question in asked:
        turns = conversation(describe(scene), [question])[:1]
        text = render(get_template("llama_3"), turns, add_generation_prompt=True).text
        prompts.append(tokenizer.bos_token + text.removeprefix(tokenizer.bos_token))
    answers = _answer(llm, tokenizer, prompts)
    right: Counter = Counter()
    for (category, _, question), answer in zip(asked, answers, strict=True):
        right[category] += answer == question.answer
    total = Counter(category for category, _, _ in asked)
    accuracy = {category: right[category] / total[category] for category in total}
    assert sum(accuracy.values()) / len(accuracy) >= 0.8, accuracy


@torch.no_grad()
def test_clip_finds_the_caption_of_a_picture(clip, tokenizer, scenes, pixels):
    captions = [describe(scene) for scene in scenes]
    tokenizer.padding_side = "right"
    text = tokenizer([c + tokenizer.eos_token for c in captions], return_tensors="pt", padding=True)
    scores = clip(pixel_values=pixels, **text).logits_per_image
    found = [captions[i] for i in scores.argmax(1).tolist()]
    assert sum(a == b for a, b in zip(found, captions, strict=True)) / len(captions) >= 0.9


@torch.no_grad()
def test_patches_like_cls_are_those_that_show_something(pixels, scenes):
    """At the layer LLaVA reads: every shape and the word keep a patch among the retained."""
    vision = CLIPVisionModel.from_pretrained(CLIP).eval()
    hidden = vision(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    likeness = torch.cosine_similarity(hidden[:, :1], hidden[:, 1:], dim=-1)
    grid = vision.config.image_size // vision.config.patch_size
    kept = torch.zeros_like(likeness).scatter(1, likeness.topk(NUM_RETAINED).indices, 1.0).view(-1, grid, grid)
    seen = total = 0
    for scene, kept_here in zip(scenes, kept, strict=True):
        width, height = scene.size
        side, short = max(scene.size), min(scene.size)
        spots = [(s.centre, s.radius * short) for s in scene.shapes]
        spots += [(scene.word_centre, 0.14 * short)] if scene.word else []
        for (x, y), reach in spots:
            column = (x * width + (side - width) / 2) / side * grid
            row = (y * height + (side - height) / 2) / side * grid
            reach = max(1.0, reach / side * grid)
            cells = torch.arange(grid) + 0.5
            near = (cells[None, :] - column) ** 2 + (cells[:, None] - row) ** 2 <= reach**2
            seen += bool((kept_here.bool() & near).any())
            total += 1
    assert seen / total >= 0.97


def test_the_readme_states_the_figures_of_both_bases():
    text = (TINY / "README.md").read_text()
    for phrase in ("retrieval", "text-only", "make_bases.py"):
        assert phrase in text


def test_a_picture_that_is_no_toy_scene_is_no_trouble(clip):
    processor = CLIPImageProcessorPil.from_pretrained(CLIP)
    odd = processor([Image.new("L", (300, 40)).convert("RGB")], return_tensors="pt")["pixel_values"]
    assert odd.shape == (1, 3, 64, 64)
    assert torch.isfinite(clip.get_image_features(pixel_values=odd).pooler_output).all()
