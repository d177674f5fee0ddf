"""Which patch of the encoder's grid shows what: the dense supervision of both tiny bases.

What arrives is a `Scene`; what leaves are arrays with one entry a patch, raster order, of the picture padded to a
square. `train_clip.py` teaches them to the encoder; `train_llm.py` feeds them to the LLM as bundles of words.
"""

from __future__ import annotations

import numpy as np

from llava_sv.data.toy_scene import MAX_SHAPES, Scene

GRID = 8
NOTHING, WORD = -1, MAX_SHAPES
"""Owners of a patch besides the indices of the scene's shapes."""

SALIENT_OF_SHAPE, SALIENT_OF_WORD = 3, 4
_FINE = 4
_AXIS = (np.arange(GRID * _FINE) + 0.5) / (GRID * _FINE)


def patch_coverage(scene: Scene) -> np.ndarray:
    """Share of each patch that each owner covers, [5, 64]: the shapes as discs, the word as its box."""
    width, height = scene.size
    side, short = max(width, height), min(width, height)

    def square(point: tuple[float, float]) -> tuple[float, float]:
        return (point[0] * width + (side - width) / 2) / side, (point[1] * height + (side - height) / 2) / side

    masks = np.zeros((MAX_SHAPES + 1, GRID * _FINE, GRID * _FINE), dtype=bool)
    for index, shape in enumerate(scene.shapes):
        x, y = square(shape.centre)
        r = shape.radius * short / side
        masks[index] = (_AXIS[None, :] - x) ** 2 + (_AXIS[:, None] - y) ** 2 <= r * r
    if scene.word:
        x, y = square(scene.word_centre)
        masks[WORD] = (abs(_AXIS[None, :] - x) <= 0.19 * short / side) & (
            abs(_AXIS[:, None] - y) <= 0.09 * short / side
        )
    cells = masks.reshape(MAX_SHAPES + 1, GRID, _FINE, GRID, _FINE)
    return cells.mean(axis=(2, 4)).reshape(MAX_SHAPES + 1, GRID * GRID)


def patch_owners(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Owner of each patch, [64] int (`NOTHING`, a shape's index or `WORD`), and which are salient, [64] bool.

    Salient are the three patches that a shape covers most, and the four of the word.
    """
    coverage = patch_coverage(scene)
    owners = np.where(coverage.max(axis=0) >= 0.2, coverage.argmax(axis=0), NOTHING)
    salient = np.zeros(GRID * GRID, dtype=bool)
    for owner in range(MAX_SHAPES + 1):
        own = np.where(owners == owner, coverage[owner], 0.0)
        best = np.argsort(-own, kind="stable")[: SALIENT_OF_WORD if owner == WORD else SALIENT_OF_SHAPE]
        salient[best[own[best] > 0]] = True
    return owners, salient
