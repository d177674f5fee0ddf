"""The fast way to pixels gives transformers' own, bit for bit, or steps back."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava_sv.mm_utils import (
    clip_image_processor_class,
    expand2square,
    load_image_processor,
    siglip_image_processor_class,
)
from llava_sv.pixels import fast_pixels

SIZES = [(640, 640), (640, 480), (333, 777), (50, 20), (64, 64), (336, 336), (1, 9), (700, 336)]
CLIP, SIGLIP = clip_image_processor_class(), siglip_image_processor_class()
PROCESSORS = {
    "tiny": lambda: load_image_processor("playground/tiny/clip"),
    "clip 336": lambda: load_image_processor("playground/tiny/clip", 336),
    "clip, a smaller crop": lambda: CLIP(size={"shortest_edge": 80}, crop_size={"height": 64, "width": 72}),
    "clip, other colours": lambda: CLIP(image_mean=[0.1, 0.2, 0.3], image_std=[0.3, 0.7, 1.1], rescale_factor=1 / 200),
    "siglip": lambda: SIGLIP(),
    "siglip 384, bilinear": lambda: SIGLIP(size={"height": 384, "width": 384}, resample=2),
}


def picture(size, mode="RGB"):
    values = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_equal_to_the_processors_own(name, size):
    processor, image = PROCESSORS[name](), picture(size)
    found, wanted = fast_pixels(image, processor), processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert found is not None
    assert (found.dtype, found.shape, found.is_contiguous()) == (wanted.dtype, wanted.shape, True)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("resample", list(Image.Resampling))
@pytest.mark.parametrize("size", [*SIZES, (480, 640), (336, 200), (2000, 3), (3, 500), (337, 335)])
def test_on_a_square_as_if_it_had_been_put_there_first(size, resample):
    processor, color = (
        CLIP(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, resample=resample),
        (9, 255, 1),
    )
    image = picture(size)
    wanted = processor(images=expand2square(image, color), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(fast_pixels(image, processor, color), wanted)
    assert image == picture(size), "the picture itself is as it was"


@pytest.mark.parametrize(
    ("change", "mode"),
    [
        ({"do_normalize": False}, "RGB"),
        ({"do_resize": False}, "RGB"),
        ({"do_rescale": False}, "RGB"),
        ({"size": {"shortest_edge": 32}}, "RGB"),
        ({"size": {"longest_edge": 64}}, "RGB"),
        ({}, "L"),
        ({}, "RGBA"),
    ],
)
def test_what_is_not_plain_is_left_to_the_processor(change, mode):
    """Settings that skip a step, a crop larger than the picture, other kinds of picture."""
    processor = CLIP(**{"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, **change})
    assert fast_pixels(picture((90, 70), mode), processor) is None


def test_another_processor_is_asked_itself():
    class Own(CLIP):
        pass

    assert fast_pixels(picture((90, 70)), Own()) is None
