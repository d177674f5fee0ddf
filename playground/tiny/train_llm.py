"""Train the tiny LLaMA on text: scenes told in words, captions, and questions about them in chat format.

What arrives are a tokenizer and a number of steps; what leaves is a `LlamaForCausalLM` and its figures.
`make_bases.py` calls it. A scene comes in sentences, or as "bundles": one position for a patch, whose input is the
mean of the embeddings of the words that tell what is there ("red", "circle", "top", "left"). Bundles are still text,
no picture is seen, but they teach the LLM to read several properties from one position, as it must read a picture.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from patches import GRID, NOTHING, WORD, patch_owners
from tiny_tokenizer import BOS, START, chat_text
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llava_sv.data.toy import conversation
from llava_sv.data.toy_questions import CATEGORIES, Question, ask_some
from llava_sv.data.toy_scene import PLACES, Scene, describe, random_scene

BUNDLE_WORDS = 4
LESSONS = ("existence", "colour", "position", "existence", "count", "colour", "existence", "position", "shape", "text")
"""Categories asked for: those that are learnt last (found by shape, or by two properties) more often."""

UNTOLD_WEIGHT = 0.05
"""Share of the loss on text that nothing before it determines: questions, and scenes in words."""

_MARK = "\x00"
"""Stands in a text where a scene's bundles go; never part of toy text."""


@dataclass
class Batch:
    """ids [B, T]; bundles [B, T, 4] word ids of each position (-1: none); is_bundle, mask, told [B, T] bool.

    `told` marks what the text before it determines: answers with their end, and captions after bundles.
    """

    ids: Tensor
    bundles: Tensor
    is_bundle: Tensor
    mask: Tensor
    told: Tensor


def make_llm(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA of width 128: 4 layers, FFN 512. At the start a word with and without its space are one, in and out."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    words = tokenizer.get_vocab()
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        for word, index in words.items():
            if word.startswith("Ġ") and word[1:] in words:
                table[index] = table[words[word[1:]]]
        model.get_output_embeddings().weight.copy_(table)
    return model


class SceneTexts:
    """Draws training examples and packs them; keeps the word ids of bundles."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.mark = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(_MARK))[0]
        self.bos, self.start = tokenizer.convert_tokens_to_ids([BOS, START])
        self.assistant, self.blank_line = tokenizer.encode("assistant\n\n", add_special_tokens=False)

    def word_ids(self, words: str) -> list[int]:
        """Ids of words as they stand inside a sentence."""
        return self.tokenizer.encode(" " + words, add_special_tokens=False)

    def bundles(self, scene: Scene, thin: bool) -> list[list[int]]:
        """One list of word ids a patch, raster order; `thin` drops most patches, but never all of an owner's."""
        owners, salient = patch_owners(scene)
        names = {i: self.word_ids(f"{s.colour} {s.shape} {PLACES[s.place]}") for i, s in enumerate(scene.shapes)}
        names |= {WORD: self.word_ids(f"word {scene.word or ''}"), NOTHING: []}
        kept = np.arange(GRID * GRID)
        if thin:
            share = self.rng.uniform(0.0, 0.6)
            draws = np.array([self.rng.random() for _ in range(GRID * GRID)])
            kept = np.flatnonzero(salient | (draws < share))
        return [names[int(owners[i])] for i in kept]

    def example(self) -> tuple[str, list[list[list[int]]]]:
        """A text with marks, and for each mark the bundles that go there."""
        rng, scene = self.rng, random_scene(self.rng)
        kind = rng.random()
        if kind < 0.25:
            return chat_text(conversation(describe(scene), ask_some(scene, rng, 8, LESSONS))), []
        if kind < 0.33:
            again = replace(scene, shapes=tuple(rng.sample(scene.shapes, len(scene.shapes))))
            return f"{describe(scene)}\n{describe(again)}\n", []
        if kind < 0.55:
            return f"{_MARK}{describe(scene)}\n", [self.bundles(scene, thin=rng.random() < 0.6)]
        if kind < 0.92:
            turns = conversation(_MARK, ask_some(scene, rng, 8, LESSONS))
            return chat_text(turns), [self.bundles(scene, thin=rng.random() < 0.75)]
        return self._two_scenes(scene, random_scene(rng))

    def _two_scenes(self, first: Scene, second: Scene) -> tuple[str, list[list[list[int]]]]:
        asked = []
        for order, scene in (("first", first), ("second", second)):
            for q in ask_some(scene, self.rng, 4):
                text = f"In the {order} image: {q.text.replace(' in the image', '')}"
                asked.append(Question(q.category, text, q.answer, q.choices))
        self.rng.shuffle(asked)
        return chat_text(conversation(f"{_MARK}\n{_MARK}", asked)), [
            self.bundles(s, thin=True) for s in (first, second)
        ]

    def batches(self, size: int, of_like_length: int = 4):
        """Endless batches of `size` examples; `of_like_length` of them are drawn together and sorted by length."""
        while True:
            drawn = [self.example() for _ in range(size * of_like_length)]
            drawn.sort(key=lambda e: len(self.tokenizer.encode(e[0])) + sum(map(len, e[1])))
            packed = [self.pack(drawn[i : i + size]) for i in range(0, len(drawn), size)]
            self.rng.shuffle(packed)
            yield from packed

    def pack(self, examples: list[tuple[str, list[list[list[int]]]]]) -> Batch:
        """Encode the texts and put the bundles where the marks are."""
        rows: list[list[int | list[int]]] = []
        for text, groups in examples:
            pending = iter(groups)
            row: list[int | list[int]] = [self.bos]
            for token in self.tokenizer.encode(text, add_special_tokens=False):
                if token == self.mark:
                    row.extend(next(pending))
                else:
                    row.append(token)
            rows.append(row)
        shape = (len(rows), max(map(len, rows)))
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        told = torch.zeros(shape, dtype=torch.bool)
        bundles = torch.full((*shape, BUNDLE_WORDS), -1)
        is_bundle, mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            mask[i, : len(row)] = True
            for j, item in enumerate(row):
                if isinstance(item, int):
                    ids[i, j] = item
                else:
                    is_bundle[i, j] = True
                    bundles[i, j, : len(item)] = torch.tensor(item, dtype=torch.long)
            told[i, : len(row)] = torch.tensor(self._told(row))
        return Batch(ids, bundles, is_bundle, mask, told)

    def _told(self, row: list[int | list[int]]) -> list[bool]:
        """What is determined: in a chat, from an assistant's header to its end of turn; else all text."""
        marks: list[bool] = []
        speaking = row[1] != self.start
        for j, item in enumerate(row):
            marks.append(speaking and not isinstance(item, list) and j > 0)
            if item == self.blank_line and row[j - 2] == self.assistant:
                speaking = True
            elif item == self.tokenizer.eos_token_id:
                speaking = False
        return marks


def embed(model: LlamaForCausalLM, batch: Batch, noise: float = 0.0) -> Tensor:
    """Input embeddings [B, T, C]: words by the table, bundles by the mean of their words, plus noise on bundles."""
    table = model.get_input_embeddings()
    words = table(batch.ids)
    present = (batch.bundles >= 0)[..., None]
    mean = (table(batch.bundles.clamp(min=0)) * present).sum(2) / present.sum(2).clamp(min=1)
    if noise:
        scale = table.weight.detach().std() * noise * torch.rand(len(words), 1, 1)
        mean = mean + scale * torch.randn_like(mean)
    return torch.where(batch.is_bundle[..., None], mean, words)


def train_llm(
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    seed: int,
    save: Callable[[LlamaForCausalLM], None],
    model: LlamaForCausalLM | None = None,
    batch_size: int = 16,
) -> LlamaForCausalLM:
    """Train by next-token loss (bundles are not predicted), from `model` or from nothing; `save` is called at times."""
    torch.manual_seed(seed)
    model = (model or make_llm(tokenizer)).train()
    texts = SceneTexts(tokenizer, seed)
    batches = texts.batches(batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 100

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, total = time.time(), 0.0
    for step in range(1, steps + 1):
        batch = next(batches)
        logits = model(inputs_embeds=embed(model, batch, noise=0.7), attention_mask=batch.mask).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
        weights = torch.where(batch.told, 1.0, UNTOLD_WEIGHT) * (batch.mask & ~batch.is_bundle)
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 100 == 0:
            print(f"llm step {step} loss {total / 100:.4f} {time.time() - start:.0f}s", flush=True)
            total = 0.0
        if step % 500 == 0 or step == steps:
            print("llm", llm_figures(model, texts.tokenizer, 60), flush=True)
            save(model)
    return model.eval()


@torch.no_grad()
def llm_figures(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, scenes: int, seed: int = 10**6) -> dict:
    """Share of right answers on fresh scenes by category, the scene told in words, told in bundles, or not at all."""
    model.eval()
    texts = SceneTexts(tokenizer, seed)
    drawn = [random_scene(texts.rng) for _ in range(scenes)]
    asked = [(s, q) for s in drawn for c in CATEGORIES.values() if (q := c(s, texts.rng)) is not None]
    figures: dict[str, dict[str, float]] = {}
    for how in ("words", "bundles", "blind"):
        examples = []
        for scene, question in asked:
            opening = {"words": describe(scene), "bundles": _MARK, "blind": ""}[how]
            groups = [texts.bundles(scene, thin=False)] if how == "bundles" else []
            examples.append((chat_text(conversation(opening, [question])), groups))
        right: list[bool] = []
        for i in range(0, len(asked), 64):
            answers = [q.answer for _, q in asked[i : i + 64]]
            right += _answers_right(model, tokenizer, texts.pack(examples[i : i + 64]), answers)
        by_category = {c: [r for r, (_, q) in zip(right, asked, strict=True) if q.category == c] for c in CATEGORIES}
        figures[how] = {c: round(sum(v) / max(1, len(v)), 3) for c, v in by_category.items()}
        figures[how]["mean"] = round(sum(figures[how].values()) / len(CATEGORIES), 3)
    model.train()
    return figures


def _answers_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: Batch, answers: list[str]
) -> list[bool]:
    """Whether every token of each row's answer, its end included, is the most likely one."""
    logits = model(inputs_embeds=embed(model, batch), attention_mask=batch.mask).logits
    hits = logits[:, :-1].argmax(-1) == batch.ids[:, 1:]
    right = []
    for answer, length, hit in zip(answers, batch.mask.sum(1).tolist(), hits, strict=True):
        tokens = len(tokenizer.encode(answer, add_special_tokens=False)) + 1
        right.append(bool(hit[length - 1 - tokens : length - 1].all()))
    return right
