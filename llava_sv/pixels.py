"""One RGB picture to the encoder's pixels, bit for bit what transformers' PIL processors make, in half the time.

After the resize a pixel is one of 256 values a channel: what rescaling and normalising make of each is looked up in a
table, which the processor's own arithmetic fills. Called by `mm_utils`; H, W pixels of the encoder's input.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

KNOWN = ("CLIPImageProcessorPil", "SiglipImageProcessorPil")
"""Processors whose steps are these: resize, crop the middle (where the processor does), rescale, normalise."""

STEPS = ("do_resize", "do_rescale", "do_normalize")


def fast_pixels(image: Image.Image, processor: Any, background: tuple[int, int, int] | None = None) -> Tensor | None:
    """[3, H, W] float32, equal to `processor(images=image)`'s; None where its settings or the picture are not of the
    plain kind, and the processor itself must be asked.

    background: the picture stands in the middle of a square of that colour (`mm_utils.expand2square`).
    """
    if image.mode != "RGB" or type(processor).__name__ not in KNOWN or not all(map(processor.__dict__.get, STEPS)):
        return None
    side = max(image.size)
    size = _resized(image.size if background is None else (side, side), processor)
    if size is None:
        return None
    width, height = size
    if processor.__dict__.get("do_center_crop"):
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        if size[0] < width or size[1] < height:
            return None
    resample = Image.Resampling(processor.resample)
    small = image.resize(size, resample) if background is None else _resized_square(image, size, background, resample)
    if size != (width, height):
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        small = small.crop((left, top, left + width, top + height))
    table = _table(tuple(processor.image_mean), tuple(processor.image_std), processor.rescale_factor)
    out = np.empty((3, height, width), dtype=np.float32)
    for channel, band in enumerate(small.split()):  # looking up what lies side by side is several times as fast
        np.take(table[channel], np.asarray(band), out=out[channel], mode="clip")
    return torch.from_numpy(out)


def _resized_square(
    image: Image.Image, size: tuple[int, int], background: tuple[int, int, int], resample: Image.Resampling
) -> Image.Image:
    """What resizing the picture in the middle of a square gives.

    Pillow resizes along rows first, then along columns, with 8 bits in between: rows of one colour are the same after
    the first step, so above and below a broad picture they are put only then.
    """
    side = max(image.size)
    if image.height < side:
        image = image.resize((size[0], image.height), resample)
    if image.height < side or image.width < side:
        square = Image.new("RGB", (image.width if image.height < side else side, side), background)
        square.paste(image, ((square.width - image.width) // 2, (side - image.height) // 2))
        image = square
    return image.resize(size, resample)


def _resized(size: tuple[int, int], processor: Any) -> tuple[int, int] | None:
    """(width, height) that the processor resizes to: a fixed one, or the shorter side fixed and the ratio kept."""
    wanted = processor.size
    names = {name for name in ("height", "width", "shortest_edge", "longest_edge") if wanted.get(name)}
    if names == {"height", "width"}:
        return wanted["width"], wanted["height"]
    if names != {"shortest_edge"}:
        return None
    (width, height), side = size, wanted["shortest_edge"]
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


@lru_cache(maxsize=16)
def _table(mean: tuple[float, ...], std: tuple[float, ...], factor: float) -> np.ndarray:
    """[3, 256] float32: each channel's pixel for each 8-bit value, by transformers' own rescale and normalise."""
    from transformers.image_transforms import normalize, rescale
    from transformers.image_utils import ChannelDimension

    values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    first = ChannelDimension.FIRST
    scaled = rescale(values, scale=factor, data_format=first, input_data_format=first)
    return normalize(scaled, mean=mean, std=std, data_format=first, input_data_format=first)[:, 0]
