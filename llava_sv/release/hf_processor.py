"""Image processors: those of transformers' LLaVA and LLaVA-NeXT to this project's, and back.

There a processor pads, cuts or crops by itself; here `image_aspect_ratio` says so, and CLIP's or SigLIP's plain
processor does the rest. Called by from_hf and to_hf; `pixels_apart` says whether both make the same pixels.
H, W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_sv.errors import UserError
from llava_sv.files import read_json
from llava_sv.mm_utils import clip_image_processor_class, image_side, process_images, siglip_image_processor_class
from llava_sv.tiling import ANYRES, default_pinpoints

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
SHARED = (
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)
CROPPING = ("do_center_crop", "crop_size")
NEXT = "LlavaNextImageProcessor"


def _classes() -> dict[str, Any]:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    return {
        "CLIPImageProcessor": clip_image_processor_class(),
        "SiglipImageProcessor": siglip_image_processor_class(),
        "LlavaImageProcessor": LlavaImageProcessorPil,
        NEXT: LlavaNextImageProcessorPil,
    }


def read_theirs(folder: Path) -> Any:
    """The image processor that a folder of transformers' layout names, the form of it that works on PIL pictures."""
    values = None
    path = folder / PROCESSOR
    if path.is_file():
        whole = read_json(path, "the download or the training again")
        values = whole.get("image_processor") if isinstance(whole, dict) else None
    if not isinstance(values, dict):
        path = folder / PREPROCESSOR
        values = read_json(path, "the download or the training again")
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not settings; get the file again")
    said = values.get("image_processor_type") or "CLIPImageProcessor"  # old files say nothing
    kind = str(said).removesuffix("Fast").removesuffix("Pil")
    classes = _classes()
    if kind not in classes:
        raise UserError(f"{path}: image_processor_type {said!r} is not converted; known: {', '.join(classes)}")
    return classes[kind].from_dict({**values, "image_processor_type": kind})


def kind_of(processor: Any) -> str:
    """Its `image_processor_type`."""
    return type(processor).__name__.removesuffix("Pil")


def to_ours(theirs: Any, where: Path) -> tuple[Any, str]:
    """(CLIP's or SigLIP's processor, `image_aspect_ratio`) that make what `theirs` makes. `UserError` where none do."""
    kind = kind_of(theirs)
    if kind == NEXT:
        aspect = ANYRES
    else:
        aspect = "pad" if kind == "LlavaImageProcessor" and getattr(theirs, "do_pad", False) else "square"
    values = {name: _plain(getattr(theirs, name, None)) for name in (*SHARED, *CROPPING)}
    values = {name: value for name, value in values.items() if value is not None}
    side = _side(values, where)
    if values.pop("do_center_crop", False):
        values |= {"do_center_crop": True, "size": {"shortest_edge": side["shortest"]}}
        return clip_image_processor_class()(**values), aspect  # type: ignore[call-arg]
    values.pop("crop_size", None)
    if "shortest_edge" in values["size"] and aspect == "square":
        raise UserError(f"{where}: do_center_crop is off and size is a shortest edge: pixels would not be square")
    values["size"] = {"height": side["shortest"], "width": side["shortest"]}
    return siglip_image_processor_class()(**values), aspect  # type: ignore[call-arg]


def _plain(value: Any) -> Any:
    """A size as a dict of numbers, whatever the release of transformers holds it in."""
    if value is not None and not isinstance(value, (int, float, str, bool, list, tuple, dict)):
        value = {name: value[name] for name in ("height", "width", "shortest_edge", "longest_edge") if value.get(name)}
    return dict(value) if isinstance(value, dict) else value


def _side(values: dict[str, Any], where: Path) -> dict[str, int]:
    size = values.get("size") or {}
    if "shortest_edge" in size:
        return {"shortest": size["shortest_edge"]}
    if size.get("height") is None or size.get("height") != size.get("width"):
        raise UserError(f"{where}: size {size} of the image processor is not square, which the encoders here need")
    return {"shortest": size["height"]}


def to_theirs(ours: Any, config: dict[str, Any]) -> Any:
    """transformers' image processor for a config of this project: the plain one, padding, or LLaVA-NeXT's."""
    aspect = config["image_aspect_ratio"] or "square"
    side = image_side(ours)
    square = {"height": side, "width": side}
    values = {name: _plain(getattr(ours, name, None)) for name in SHARED}
    cropped = bool(getattr(ours, "do_center_crop", False))
    classes = _classes()
    if aspect == "square":
        return ours
    values |= {"do_center_crop": cropped, "crop_size": square}
    if aspect == ANYRES:
        pinpoints = config["image_grid_pinpoints"] or default_pinpoints(side)
        return classes[NEXT](**values, do_pad=True, image_grid_pinpoints=swapped(pinpoints))
    return classes["LlavaImageProcessor"](**values, do_pad=True)


def swapped(pinpoints: Any) -> list[list[int]]:
    """(height, width) as transformers has resolutions, to (width, height) as they are here; or the other way."""
    return [[second, first] for first, second in pinpoints]


def pictures() -> list[Image.Image]:
    """A few pictures of several shapes, the same always."""
    rng = np.random.default_rng(0)
    shapes = ((61, 47), (40, 90), (64, 64), (33, 120))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in shapes]


class Settings:
    """A config's fields as attributes, as `process_images` asks for them."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def pixels_apart(theirs: Any, ours: Any, config: dict[str, Any]) -> float:
    """The largest difference between both processors' pixels over `pictures`; infinite where shapes differ."""
    most = 0.0
    for picture in pictures():
        wanted = torch.as_tensor(np.array(theirs(images=picture, return_tensors="pt")["pixel_values"]))[0].float()
        found = process_images([picture], ours, Settings(config))[0].float()
        if wanted.shape != found.shape:
            return float("inf")
        most = max(most, float((wanted - found).abs().max()))
    return most


def note_on_pixels(theirs: Any, ours: Any, config: dict[str, Any]) -> list[str]:
    """What to tell the user where the two processors make different pixels."""
    apart = pixels_apart(theirs, ours, config)
    if apart <= 1e-6:
        return []
    how = "another size" if apart == float("inf") else f"up to {apart:.2g} apart"
    return [f"pictures: {kind_of(theirs)} and image_aspect_ratio {config['image_aspect_ratio']} make pixels {how}"]
