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


def fast_pixels(image: Image.Image, processor: Any) -> Tensor | None:
    """[3, H, W] float32, equal to `processor(images=image)`'s; None where its settings or the picture are not of the
    plain kind, and the processor itself must be asked."""
    if image.mode != "RGB" or type(processor).__name__ not in KNOWN or not all(map(processor.__dict__.get, STEPS)):
        return None
    size = _resized(image.size, processor)
    if size is None:
        return None
    small = np.asarray(image.resize(size, resample=Image.Resampling(processor.resample)))
    if processor.__dict__.get("do_center_crop"):
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        if small.shape[0] < height or small.shape[1] < width:
            return None
        top, left = (small.shape[0] - height) // 2, (small.shape[1] - width) // 2
        small = small[top : top + height, left : left + width]
    table = _table(tuple(processor.image_mean), tuple(processor.image_std), processor.rescale_factor)
    out = np.empty((3, *small.shape[:2]), dtype=np.float32)
    for channel in range(3):
        np.take(table[channel], small[:, :, channel], out=out[channel], mode="clip")
    return torch.from_numpy(out)


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
