"""A dense and a skipping checkpoint, and a small toy benchmark, made once."""

from __future__ import annotations

import pytest

from llava_sv.data import toy
from llava_sv.generation import load_for_inference
from tests.checkpoints import SKIP, save_checkpoint


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("dense") / "tiny-dense", None, train_seconds=20.0)


@pytest.fixture(scope="session")
def skip_checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("skip") / "tiny-skip", SKIP, train_seconds=10.0)


@pytest.fixture(scope="session")
def skip_assistant(skip_checkpoint):
    return load_for_inference(str(skip_checkpoint), device="cpu")


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    assert toy.main(["--output", str(folder), "--train", "2", "--bench", "12", "--fine-bench", "0"]) == 0
    return folder
