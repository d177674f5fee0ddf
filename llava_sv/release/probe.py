"""Two folders asked the same about one picture, each loaded as its users load it: largest difference of their logits,
and their greedy texts. Called by converting, before a new folder takes its place.

Both are loaded in the type that the new folder stores, then computed in float32 on the CPU, one after the other: what
is left is the difference of two programs, not that of rounding. T positions, K vocabulary.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from llava_sv.bench.room import available_bytes
from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.errors import UserError, in_words
from llava_sv.mm_utils import load_image_processor, process_images, tokenizer_image_token
from llava_sv.release import hf_processor
from llava_sv.release.layouts import read_values
from llava_sv.release.plan import Plan
from llava_sv.release.weights import Entry

TOLERANCE = 1e-4
"""Largest difference of logits, in units of the largest logit where that is above 1."""
PROMPT = "USER: <image>\nWhat is in this picture? ASSISTANT:"
NEW_TOKENS = 8
NO_NUMBERS = "weights: NaN or infinite values in "
ROOM = 1.3
"""Memory that a probe takes, in units of its float32 weights."""


@dataclass
class Answer:
    """What a model said: logits [T, K] and greedy text; and what its own tokenizer and image processor make of the
    question: ids [T0] with one mark for the picture, pixels [3, H, W] or [views, 3, H, W]."""

    ids: list[int]
    pixels: Tensor
    logits: Tensor
    text: str


@dataclass
class Agreement:
    """largest: difference of logits; tolerance: what is allowed; same_text: whether greedy texts are equal."""

    largest: float
    tolerance: float
    same_text: bool


def picture() -> Image.Image:
    """The picture of the probe: shades and noise, wider than high, the same always."""
    noise = np.random.default_rng(1).integers(0, 60, (96, 128, 3))
    shade = np.add.outer(np.arange(96), np.arange(128))[..., None] * np.array([0.8, 0.5, 0.2])
    return Image.fromarray(np.clip(shade + noise, 0, 255).astype(np.uint8))


def compare(old: Answer, new: Answer) -> Agreement:
    """Logits over the positions and vocabulary that both have. `UserError` where positions differ in number."""
    if old.logits.shape[0] != new.logits.shape[0]:
        raise UserError(
            f"check: the source sees {old.logits.shape[0]} positions and the result {new.logits.shape[0]}; nothing is "
            "left behind"
        )
    words = min(old.logits.shape[1], new.logits.shape[1])
    first, second = old.logits[:, :words], new.logits[:, :words]
    largest = float((first - second).abs().max())
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        largest = float("nan") if not torch.equal(first.isfinite(), second.isfinite()) else largest
    tolerance = TOLERANCE * max(1.0, float(first.abs().max()))
    return Agreement(largest, tolerance, old.text == new.text)


def refuse(agreement: Agreement) -> None:
    """`UserError` where logits are further apart than the tolerance, or are no numbers."""
    if not agreement.largest <= agreement.tolerance:
        raise UserError(
            f"check: logits of source and result are up to {agreement.largest:.3g} apart, and "
            f"{agreement.tolerance:.3g} is allowed (1e-4, times the largest logit where that is above 1); nothing is "
            "left behind"
        )


def refuse_no_numbers(answer: Answer, notes: list[str]) -> None:
    """`UserError` for logits that are NaN or infinite, with the note of `compare_weights` on weights that are."""
    if not bool(answer.logits.isfinite().all()):
        why = next((note for note in notes if note.startswith(NO_NUMBERS)), "no weight is, a sum grows too large")
        raise UserError(f"check: the result's logits are NaN or infinite ({why}); nothing is left behind")


def ask(
    folder: Path, layout: str, dtype: torch.dtype, dense: bool = False, asked: Answer | None = None, **how: Any
) -> Answer:
    """The answer of the checkpoint in `folder`. dense: leave its skipping out; asked: give it the ids and pixels
    of that one, not those of its own tokenizer and image processor; how: more for `load_pretrained_model`."""
    with _quiet(), torch.inference_mode(), _in_a_line(folder, layout):
        answer = _ask_hf(folder, dtype, asked) if layout == "hf" else _ask_ours(folder, dtype, dense, asked, how)
    gc.collect()
    return answer


def _ask_ours(folder: Path, dtype: torch.dtype, dense: bool, asked: Answer | None, how: dict[str, Any]) -> Answer:
    from llava_sv.model.builder import load_pretrained_model
    from llava_sv.model.builders.tokenizer import load_tokenizer
    from llava_sv.model.loading import load_whole, read_config

    if dense:
        config = read_config(str(folder))
        config.skip_vision = None
        model = load_whole(str(folder), config, dtype=dtype, unused_weights=("model.mm_projector.summary.",)).eval()
        tokenizer = load_tokenizer(str(folder))
        processor = load_image_processor(str(folder), config.mm_vision_image_size)
    else:
        tokenizer, model, processor, _ = load_pretrained_model(
            str(folder), device="cpu", device_map=None, torch_dtype=dtype, **how
        )
    model = model.float()
    image = picture()
    ids = list(tokenizer_image_token(PROMPT, tokenizer))
    pixels = process_images([image], processor, model.config)[0]
    given: dict[str, Any] = {"images": [asked.pixels if asked else pixels], "image_sizes": [image.size]}
    prompt = torch.tensor([asked.ids if asked else ids])
    logits = model(input_ids=prompt, **given).logits[0].float()
    tokens = model.generate(prompt, **given, max_new_tokens=NEW_TOKENS, do_sample=False)
    return Answer(ids, pixels, logits, tokenizer.decode(tokens[0], skip_special_tokens=True))


def _ask_hf(folder: Path, dtype: torch.dtype, asked: Answer | None) -> Answer:
    from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    is_next = read_values(folder)["model_type"] == "llava_next"
    kind: Any = LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration
    model, info = kind.from_pretrained(str(folder), dtype=dtype, output_loading_info=True)
    wrong = sorted([*info["missing_keys"], *info["unexpected_keys"]])
    if wrong:
        raise UserError(f"check: {folder.name}: transformers finds {len(wrong)} weight(s) amiss, {wrong[0]} among them")
    model = model.eval().float()
    processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
    processor.image_processor = hf_processor.read_theirs(folder)  # pictures by PIL, whatever is installed
    given = processor(images=picture(), text=PROMPT, return_tensors="pt")
    image = model.config.image_token_index
    ids, pixels = _with_one_mark(given["input_ids"][0].tolist(), image), given["pixel_values"][0]
    if asked is not None:
        tokens = int((given["input_ids"] == image).sum())
        row = [one for i in asked.ids for one in ([image] * tokens if i == IMAGE_TOKEN_INDEX else [i])]
        given["input_ids"] = torch.tensor([row])
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["pixel_values"] = asked.pixels[None]
    logits = model(**given).logits[0].float()
    tokens = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = tokens[0, given["input_ids"].shape[1] :]
    return Answer(ids, pixels, logits, processor.tokenizer.decode(new, skip_special_tokens=True))


def _with_one_mark(ids: list[int], image: int) -> list[int]:
    """A run of image tokens as one mark."""
    marked = [IMAGE_TOKEN_INDEX if i == image else i for i in ids]
    return [i for n, i in enumerate(marked) if i != IMAGE_TOKEN_INDEX or n == 0 or marked[n - 1] != IMAGE_TOKEN_INDEX]


@contextmanager
def _in_a_line(folder: Path, layout: str) -> Iterator[None]:
    """What transformers refuses in a folder of its own layout is that folder's fault, not a bug here."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        if layout != "hf":
            raise
        raise UserError(f"check: {folder}: transformers cannot ask it ({in_words(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors only from transformers while models are loaded twice over; its bars are off."""
    from transformers.utils import logging as theirs

    logger = logging.getLogger("transformers")
    level, bars = logger.level, theirs.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()


def lacks_memory(entries: list[Entry]) -> str | None:
    """Why a probe of a model with these weights would not fit, in words; None where it does."""
    needed = int(sum(entry.bytes // entry.dtype.itemsize for entry in entries) * 4 * ROOM)
    free = available_bytes(torch.device("cpu"))
    if needed <= free:
        return None
    return f"logits are not compared: that takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


def compare_weights(old: Plan, new: Plan, dtype: torch.dtype | None, notes: list[str]) -> int:
    """Number of weights of both plans, each read and equal in the type that the new one stores; embedding rows that
    were added or removed are not compared. `UserError` names the first that differs; weights that hold NaN or infinity
    are told in `notes`."""
    broken: list[str] = []
    by_name = {entry.name: entry for entry in new.entries}
    shared = [entry for entry in old.entries if entry.name in by_name]
    size = sum(entry.bytes for entry in shared)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="check", disable=None)
    for entry in shared:
        first, second = entry.load(), by_name[entry.name].load()
        first = first.to(dtype) if dtype is not None and first.is_floating_point() else first
        rows = min(first.shape[0], second.shape[0]) if first.dim() else 0
        if rows:
            first, second = first[:rows], second[:rows]
        same = first.dtype == second.dtype and torch.equal(first, second)
        if not same and not (first.isnan().any() and _same_bytes(first, second)):
            raise UserError(f"check: {entry.name} is not what {entry.file} holds; nothing is left behind")
        if second.is_floating_point() and not bool(second.isfinite().all()):
            broken.append(entry.name)
        bar.update(entry.bytes)
    bar.close()
    if broken:
        notes.append(NO_NUMBERS + ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if broken[3:] else ""))
    return len(shared)


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(
        first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8)
    )
