"""A dense and a skipping checkpoint, and a folder of pictures, made once."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import SKIP, save_checkpoint


@pytest.fixture(scope="session")
def skip_checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("analysis") / "tiny-skip", SKIP, train_seconds=10.0)


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("analysis") / "tiny-dense", None, train_seconds=20.0)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Four pictures of noise, one of them a folder down; a file that is no picture lies beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deeper").mkdir()
    (folder / "notes.txt").write_text("not a picture", encoding="utf-8")
    random = np.random.default_rng(0)
    for name in ("a.png", "b.JPG", "c.webp", "deeper/d.png"):
        pixels = random.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder
