"""Prompts and pictures on their way to the model: text with `<image>` -> ids, PIL images -> pixel tensors.

Training, evaluation, chat and server all call these, so that a model sees at inference what it saw in training.
H, W pixels of the encoder's input; V pictures; T tokens, an image being one mark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from llava_sv.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_sv.errors import UserError


class ImageError(UserError):
    """A picture that cannot be read; `kind` is "missing" or "corrupt"."""

    def __init__(self, message: str, kind: str = "corrupt") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class EncodedPrompt:
    """Token ids, and the [start, end) characters each stands for; an added BOS has an empty span at 0."""

    input_ids: list[int]
    offsets: list[tuple[int, int]]


def encode_prompt(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, with_offsets: bool = True
) -> EncodedPrompt:
    """Tokenise the text between images piece by piece, as LLaVA does, with `image_token_index` at each `<image>`.

    Exactly one BOS leads where the tokenizer adds one or the text begins with one. Offsets need a fast tokenizer;
    without `with_offsets` they are empty.
    """
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    position = 0
    for index, piece in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        if index:
            ids.append(image_token_index)
            offsets.append((position, position + len(DEFAULT_IMAGE_TOKEN)))
            position += len(DEFAULT_IMAGE_TOKEN)
        if piece:
            encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=with_offsets, verbose=False)
            ids += encoded["input_ids"]
            if with_offsets:
                offsets += [(position + start, position + end) for start, end in encoded["offset_mapping"]]
        position += len(piece)
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids.insert(0, tokenizer.bos_token_id)
        offsets.insert(0, (0, 0))
    return EncodedPrompt(ids, offsets if with_offsets else [])


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | Tensor:
    """Ids of a prompt with images: a list, or a LongTensor [T] for `return_tensors="pt"`. See `encode_prompt`."""
    ids = encode_prompt(prompt, tokenizer, image_token_index, with_offsets=False).input_ids
    if return_tensors is None:
        return ids
    if return_tensors != "pt":
        raise ValueError(f"return_tensors: unknown value {return_tensors!r}; known: None, 'pt'")
    return torch.tensor(ids, dtype=torch.long)


def expand2square(image: Image.Image, background_color: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of the smallest square that holds it, on `background_color`."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background_color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def mean_color(image_processor: Any) -> tuple[int, int, int]:
    """The processor's mean as 8-bit RGB: what becomes zero after normalisation."""
    red, green, blue = (int(value * 255) for value in image_processor.image_mean)
    return red, green, blue


def _pixels(image: Image.Image, image_processor: Any) -> Tensor:
    return image_processor(images=image, return_tensors="pt")["pixel_values"][0]


def _pad(image: Image.Image, image_processor: Any, model_cfg: Any) -> Tensor:
    return _pixels(expand2square(image, mean_color(image_processor)), image_processor)


def _square(image: Image.Image, image_processor: Any, model_cfg: Any) -> Tensor:
    return _pixels(image, image_processor)


ASPECT_RATIOS: dict[str, Callable[[Image.Image, Any, Any], Tensor]] = {"pad": _pad, "square": _square}
"""`image_aspect_ratio` -> (picture, processor, model config) -> pixels. `pad` grows a picture to a square; `square` is
the processor's own resize and centre crop. A family that tiles adds its entry here."""


def process_images(images: Sequence[Image.Image], image_processor: Any, model_cfg: Any) -> Tensor | list[Tensor]:
    """Pixels of RGB pictures: [V, 3, H, W] where all are of one shape, else a list of V tensors.

    model_cfg: whatever has `image_aspect_ratio` (a key of `ASPECT_RATIOS`; none or empty means `square`).
    Raises `UserError` for an unknown `image_aspect_ratio`.
    """
    name = getattr(model_cfg, "image_aspect_ratio", None) or "square"
    if name not in ASPECT_RATIOS:
        raise UserError(f"unknown image_aspect_ratio {name!r}; known: {', '.join(ASPECT_RATIOS)}")
    pixels = [ASPECT_RATIOS[name](image, image_processor, model_cfg) for image in images]
    if pixels and all(pixel.shape == pixels[0].shape for pixel in pixels):
        return torch.stack(pixels)
    return pixels


def load_image(path: str | Path) -> Image.Image:
    """The picture at `path`, upright (EXIF orientation applied), as RGB, read whole.

    Raises `ImageError`, of kind "missing" or "corrupt".
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"no such image file: {path}", kind="missing")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise ImageError(f"image file {path} cannot be read ({type(error).__name__}: {error})") from error


def clip_image_processor_class() -> type:
    """CLIP's image processor that works on PIL images, whether or not torchvision is there: pixels then do not depend
    on what is installed."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil


def load_image_processor(path: str) -> Any:
    """The image processor saved at `path` (a folder or a Hugging Face id). Raises `UserError` where there is none."""
    try:
        return clip_image_processor_class().from_pretrained(path)  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot read the image processor, preprocessor_config.json ({reason})") from error


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a path, with the part before it for a `checkpoint-N`."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]
