"""A training batch made anew from JPEGs, as loader and trainer make it. Called by the split of `bench train`.

A picture is decoded, made into the encoder's pixels, collated with ids and labels, and brought to the device.
"""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_sv.bench.models import make_batch, make_config
from llava_sv.bench.sizes import BenchSize
from llava_sv.data.collator import DataCollatorForSupervisedDataset
from llava_sv.mm_utils import clip_image_processor_class, load_image, process_images

PICTURE = (640, 480)
"""Width and height of the JPEG, COCO's most common."""


def make_jpeg(size: tuple[int, int] = PICTURE) -> bytes:
    """A smooth picture with some noise on it: neither of one colour nor incompressible."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 5, height))
    waves = np.stack([np.sin(x + phase) * np.cos(y - phase) for phase in range(3)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 6, waves.shape)
    pixels = np.clip(128 + 90 * waves + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=90)
    return file.getvalue()


class Feed:
    """Call it for a batch on the device: the forward's `input_ids`, `labels`, `attention_mask`, `images`."""

    def __init__(self, size: BenchSize, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.config = device, dtype, make_config(size, None)
        side = size.vision["image_size"]
        make: Any = clip_image_processor_class()
        self.processor = make(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        self.collate = DataCollatorForSupervisedDataset(SimpleNamespace(pad_token_id=0, name_or_path="bench"))
        self.jpeg = make_jpeg()
        batch = make_batch(size, torch.device("cpu"), torch.float32)
        self.texts = list(zip(batch.input_ids, batch.labels))

    def __call__(self) -> dict[str, Any]:
        samples = []
        for ids, labels in self.texts:
            picture = load_image("bench.jpg", self.jpeg)
            pixels = process_images([picture], self.processor, self.config)
            samples.append({"input_ids": ids, "labels": labels, "images": list(pixels), "image_sizes": [picture.size]})
        batch = self.collate(samples)
        moved = {name: batch[name].to(self.device) for name in ("input_ids", "labels", "attention_mask")}
        images = [image.to(self.device, self.dtype) for image in batch["images"]]
        return {**moved, "images": images, "image_sizes": batch["image_sizes"]}
