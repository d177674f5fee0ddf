"""Where on the picture an image's tokens stand: attention to tokens becomes attention to patches.

`Places` listens to the projector while the model answers; `spread` then hands each token's attention to the patches
that it was made of. It asks the projector's own grouping, by its derivative: a kept token is the mean of its patches,
so what flows back from it to each is its share, whatever chose, tiled or merged them. Called by `analyze attention`.

V views, N patches a view, n tokens of the image, K channels (layers), C LLM width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_sv.eval.patches import shown
from llava_sv.generation import Assistant
from llava_sv.model.cos_presets import scales_of
from llava_sv.model.token_counts import grid_side, hd_grid
from llava_sv.model.token_groups import TokenRole


@dataclass
class Canvas:
    """One grid of patches. name: `picture`, `overview` or `tiles`; pixels: [H, W, 3] in 0..1, as the encoder sees them;
    mass: [K, rows, columns]; retained: bool [rows, columns], patches that a retained token holds."""

    name: str
    pixels: np.ndarray
    mass: np.ndarray
    retained: np.ndarray


@dataclass
class Picture:
    """What is drawn of one picture: canvases with channels 0..L-1 its layers'."""

    name: str
    answer: str
    canvases: list[Canvas]


class Places:
    """The latest image that `assistant`'s projector was given, while this is entered as a context."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.config = assistant.model.config
        self.projector = assistant.model.get_model().mm_projector
        self._given: dict[str, Any] = {}

    def __enter__(self) -> Places:
        self._hook = self.projector.register_forward_pre_hook(self._listen, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _listen(self, module: Any, args: tuple, kwargs: dict) -> None:
        self._given = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    def canvases(self, pixels: Tensor, size: tuple[int, int], roles: Tensor, mass: Tensor) -> list[Canvas]:
        """The image's grids with the attention that its tokens got.

        pixels: [3, S, S] or [views, 3, S, S], as the encoder got them; size: (width, height) of the picture; roles:
        [n] of its tokens; mass: [K, n]. Summaries pool a whole group and have no place: their mass is left out, as is
        that of tokens made of no patch (newlines, CLS).
        """
        retained = (roles == int(TokenRole.RETAINED)) | (roles == int(TokenRole.FINE))
        placed = torch.cat([mass.float(), retained[None].float()]) * (roles != int(TokenRole.SUMMARY))
        maps = GRIDS[self.config.mm_family](self.config, self.spread(placed), size)
        views = pixels if pixels.dim() == 4 else pixels[None]
        pictures = {"picture": views[0], "overview": views[0]}
        if "tiles" in maps:
            columns, rows = hd_grid(self.config, size)
            side = views.shape[-1]
            tiles = views[1:].view(rows, columns, 3, side, side).permute(2, 0, 3, 1, 4)
            pictures["tiles"] = tiles.reshape(3, rows * side, columns * side)
        return [
            Canvas(name, shown(pictures[name], self.assistant), grid[:-1].numpy(), grid[-1].numpy() > 0)
            for name, grid in maps.items()
        ]

    @torch.enable_grad()
    def spread(self, mass: Tensor) -> Tensor:
        """mass [K, n] of the image's tokens -> [K, V, N] on the CPU, of what the projector made of each patch or query.

        A channel of the language model's width carries each of the K, for none mixes with another on the way.
        """
        given = self._given
        with torch.no_grad():
            tokens = self.projector.tokens_of(given["features"])
        tokens = tokens.detach().to(torch.promote_types(tokens.dtype, torch.float32)).requires_grad_()
        (group,) = self.projector.grouping(
            _Precise(self.projector, tokens.dtype),
            tokens,
            given["features"],
            given["views_per_image"],
            given.get("image_sizes"),
        )
        width = tokens.shape[-1]
        parts = []
        for chunk in mass.to(group.tokens).split(width):
            flowing = torch.zeros_like(group.tokens)
            flowing[:, : len(chunk)] = chunk.T
            (back,) = torch.autograd.grad(group.tokens, tokens, flowing, retain_graph=True)
            parts.append(back[..., : len(chunk)].permute(2, 0, 1).cpu())
        return torch.cat(parts).float()


def llava_grids(config: Any, spread: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """LLaVA: the one view's patches."""
    return {"picture": _views(config, spread)[:, 0]}


def hd_grids(config: Any, spread: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """LLaVA-HD: the overview's patches, and those of all tiles at their places, where the image has any."""
    views = _views(config, spread)
    grids = {"overview": views[:, 0]}
    if views.shape[1] > 1:
        columns, rows = hd_grid(config, size)
        tiles = views[:, 1:].unflatten(1, (rows, columns)).transpose(2, 3)
        grids["tiles"] = tiles.reshape(len(spread), rows * views.shape[-2], columns * views.shape[-1])
    return grids


def cos_grids(config: Any, spread: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """CoS, whose N are queries of all scales: each window's share lies on all of its cells alike."""
    side, queries = grid_side(config), spread[:, 0]
    total = torch.zeros(len(queries), side, side)
    scales = scales_of(config, side)
    for scale, part in zip(scales, queries.split([scale.queries for scale in scales], dim=1), strict=True):
        per_side, own = scale.windows_per_side, scale.queries_per_side
        windows = part.reshape(-1, per_side, own, per_side, own).sum(dim=(2, 4)) / scale.window**2
        total += windows.repeat_interleave(scale.window, dim=1).repeat_interleave(scale.window, dim=2)
    return {"picture": total}


def _views(config: Any, spread: Tensor) -> Tensor:
    """[K, V, N] -> [K, V, side, side]; a CLS token, where there is one, leads and has no place."""
    side = grid_side(config)
    return spread[:, :, -side * side :].unflatten(2, (side, side))


GRIDS: dict[str, Callable[[Any, Tensor, tuple[int, int]], dict[str, Tensor]]] = {
    "llava": llava_grids,
    "llava_hd": hd_grids,
    "cos": cos_grids,
}
"""Family -> (config, [K, V, N] on what the projector made, the picture's size) -> grid's name -> [K, rows, columns]."""


class _Precise:
    """A projector as its grouping sees it, with the weights that the grouping uses in `dtype`."""

    def __init__(self, projector: Any, dtype: torch.dtype) -> None:
        self._projector = projector
        self.summary = None if projector.summary is None else copy.deepcopy(projector.summary).to(dtype)
        newline = projector.image_newline
        self.image_newline = None if newline is None else newline.detach().to(dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._projector, name)
