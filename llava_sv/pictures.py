"""A picture by whatever name messages give it, as upright RGB. Called by `processing`.

A PIL image, array, path, URL or base64 text arrives; a PIL image or a `UserError` leaves.
"""

from __future__ import annotations

import base64
import io
import os
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from PIL import Image
from torch import Tensor

from llava_sv.decoding import ImageError, decode_image, upright_rgb
from llava_sv.errors import UserError
from llava_sv.mm_utils import load_image

WEB_TIMEOUT = 30.0
"""Seconds to wait for a picture from the web."""
WEB_BYTES = 128 * 2**20
"""Most bytes of such a picture."""
LEAST_BASE64 = 40
"""Characters below which a text is the path of a picture, and not the picture."""


def as_picture(source: Any) -> Image.Image:
    """A PIL image, path, URL, base64 text or array [H, W, 3] of uint8 as upright RGB. Raises `UserError`."""
    if isinstance(source, Image.Image) and 0 not in source.size:
        return upright_rgb(source)
    if isinstance(source, Path):
        return load_image(source)
    if isinstance(source, str):
        return _named_picture(source)
    if isinstance(source, Tensor):
        source = source.numpy(force=True)
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] == (3,) and source.size:
        return Image.fromarray(np.ascontiguousarray(source))
    shape = f" of shape {list(source.shape)} and {source.dtype}" if isinstance(source, np.ndarray) else ""
    shape = f" of {source.width} x {source.height} pixels" if isinstance(source, Image.Image) else shape
    raise UserError(
        f"processor: images: cannot read a {type(source).__name__}{shape}; give a PIL image, a path, a URL, base64 "
        "text or an array [height, width, 3] of uint8"
    )


def _named_picture(source: str) -> Image.Image:
    if source[:8].lower().startswith(("http://", "https://")):
        return decode_image(io.BytesIO(_fetched(source)), source)
    if source.startswith("data:image/"):
        try:
            data = _decoded(source.partition(",")[2])
        except ValueError as error:
            raise UserError(f"picture data:image/...: is not base64 ({error})") from error
        return decode_image(io.BytesIO(data), "data:image/...")
    if len(source) >= LEAST_BASE64 and not os.path.exists(source):
        try:
            return decode_image(io.BytesIO(_decoded(source)), f"{source[:20]}... (base64)")
        except ImageError as error:
            if error.reason != "undecodable":
                raise
        except ValueError:
            pass  # a path, and nothing is there
    return load_image(source)


def _decoded(text: str) -> bytes:
    return base64.b64decode("".join(text.split()), validate=True)


def _fetched(url: str) -> bytes:
    """What lies at a URL; neither longer than `WEB_TIMEOUT` nor more than `WEB_BYTES`."""
    ends, data = time.monotonic() + WEB_TIMEOUT, bytearray()
    try:
        with urlopen(url, timeout=WEB_TIMEOUT) as answer:
            while len(data) <= WEB_BYTES and (piece := answer.read1(2**20)):
                data += piece
                if time.monotonic() > ends:
                    raise TimeoutError(f"not there after {WEB_TIMEOUT:g} seconds")
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"picture {url}: cannot be fetched ({error or type(error).__name__})") from error
    if len(data) > WEB_BYTES:
        raise UserError(f"picture {url}: has more than {WEB_BYTES >> 20} MiB; fetch it, and give the file")
    return bytes(data)
