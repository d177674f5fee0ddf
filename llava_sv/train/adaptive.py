"""`num_retained: auto`: the threshold that gives the average budget, found on the training data's own images.

Called by `train.train` before the first step, on every rank; config.json then holds it, and inference needs no data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_sv.cluster.agree import gather
from llava_sv.errors import UserError
from llava_sv.model.checkpoint_io import gathered
from llava_sv.model.compression.adaptive import find_threshold
from llava_sv.model.compression.select import get_selector, wants_of
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.retained_budget import FIELDS, over

LOOKED_AT = 512
"""Images that the threshold is found on: the average over others then lies within about a percent of the budget."""

AT_ONCE = 16


def settle(model: Any, dataset: Any, device: torch.device, checkpoint: Path | None = None) -> str:
    """Set the model's `retained_threshold` where it has none yet, and say how; "" where there is nothing to do.

    dataset: a `LazySupervisedDataset`. checkpoint: what the run goes on from: its threshold is taken, unless it was
    found for another average, other bounds or another selection. Raises `UserError` where no record has an image, and
    where none of those looked at can be read.
    """
    skip = model.config.skip_vision
    if skip is None or not skip.adaptive or skip.retained_threshold is not None:
        return ""
    known = _threshold_of(checkpoint, skip)
    if known is not None:
        skip.retained_threshold = known
        return f"num_retained auto: threshold {known:.4f}, the checkpoint's"
    with_image = np.flatnonzero(dataset.modalities())
    if not len(with_image):
        raise UserError(
            "num_retained auto is fitted to the training images, and no record has one; "
            "give --sv_retained_threshold, or a number of tokens (--sv_num_retained)"
        )
    chosen = with_image[np.unique(np.linspace(0, len(with_image) - 1, LOOKED_AT).round().astype(int))]
    images = (image for index in chosen.tolist() for image in dataset[index]["images"])
    skipping: list[bool] = []
    scores = scores_of(model, _first_views(images, skipping), device)
    dataset.reader.counts.forget()  # training counts the pictures that it cannot read itself
    if not len(scores):
        raise UserError(
            f"num_retained auto is fitted to the training images, and none of {len(chosen)} records looked at has one "
            "that can be read; check --image_folder, or give --sv_retained_threshold"
        )
    scores = scores[torch.tensor(skipping)] if any(skipping) else scores
    threshold, counts = find_threshold(scores, skip)
    skip.retained_threshold = gather(threshold)[0]  # other devices may round otherwise
    return (
        f"num_retained auto: threshold {skip.retained_threshold:.4f}, found on {len(counts)} images: "
        f"{counts.double().mean():.1f} retained on average, {int(counts.min())} to {int(counts.max())}"
    )


@contextmanager
def at_the_most(model: Any) -> Iterator[None]:
    """Inside, every image retains `retained_max`: what memory must hold."""
    skip = model.config.skip_vision
    if skip is None or not skip.adaptive:
        yield
        return
    least = skip.retained_min
    skip.retained_min = skip.retained_max
    try:
        yield
    finally:
        skip.retained_min = least


@torch.no_grad()
def scores_of(model: Any, views: Iterator[Tensor], device: torch.device) -> Tensor:
    """What `selection` scores of each view's patches: views [3, H, W] -> [V, N] float32, in host memory; V may be 0."""
    skip, tower = model.config.skip_vision, model.get_vision_tower()
    select, wanted = get_selector(skip.selection), wants_of(skip.selection)
    found: list[Tensor] = []
    waiting: list[Tensor] = []

    def score() -> None:
        pixels = torch.stack(waiting).to(tower.device, tower.dtype)
        found.append(select(tower(pixels, **wanted)).float().cpu())
        waiting.clear()

    with gathered(list(tower.parameters())), _on(device, tower):
        for view in views:
            waiting.append(view)
            if len(waiting) == AT_ONCE:
                score()
        if waiting:
            score()
    return torch.cat(found) if found else torch.empty(0, 0)


def _first_views(images: Iterator[Tensor], skipping: list[bool]) -> Iterator[Tensor]:
    """Of each image, the view that retained tokens are chosen from: HD's overview. `skipping` is told which images skip
    anything: one that HD cuts into no tiles stays whole, whatever its content."""
    for image in images:
        skipping.append(image.dim() == 3 or len(image) > 1)
        yield image[0] if image.dim() == 4 else image


def _threshold_of(checkpoint: Path | None, skip: SkipVisionConfig) -> float | None:
    """What the config.json of a checkpoint holds, if it has one; None where it was found for another choice."""
    path = None if checkpoint is None else checkpoint / "config.json"
    if path is None or not path.is_file():
        return None
    block = json.loads(path.read_text(encoding="utf-8")).get("skip_vision") or {}
    choice = {name: getattr(skip, name) for name in ("num_retained", "selection", *FIELDS[:3])}
    return over(block, choice).get("retained_threshold")


@contextmanager
def _on(device: torch.device, tower: Any) -> Iterator[None]:
    """The encoder on `device` for a while; where ZeRO-3 has partitioned it, it stays."""
    before = tower.device
    moves = before.type != device.type and not any(hasattr(p, "ds_id") for p in tower.parameters())
    if moves:
        tower.to(device)
    try:
        yield
    finally:
        if moves:
            tower.to(before)
