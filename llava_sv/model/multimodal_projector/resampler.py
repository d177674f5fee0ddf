"""The multi-scale visual resampler of CoS: learned queries read the encoder's features window by window, by scale.

Feature levels of the encoder come in, tokens of the language model's width leave, coarse to fine.
V views, E encoder width, C LLM width, G cells a side of the grid; of one scale: P windows a side, W = P^2 windows,
Q queries and K cells of one window, S queries a side over all windows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_sv.model.compression.select import VisionFeatures
from llava_sv.model.cos_presets import query_counts, scales_of
from llava_sv.model.multimodal_projector.mlp import Projector
from llava_sv.model.multimodal_projector.scaling import Wanted, Weights, scale_weights
from llava_sv.model.token_counts import grid_side

HEAD_WIDTH = 64
QUERY_STD = 0.02


def heads_of(width: int) -> int:
    """Attention heads of 64 for `width`; fewer and wider ones where that does not divide it."""
    return next(heads for heads in range(max(width // HEAD_WIDTH, 1), 0, -1) if width % heads == 0)


def to_windows(maps: Tensor, per_side: int) -> Tensor:
    """[V, side, side, ...] -> [V, W, cells of a window, ...]: windows in raster order, and cells in each."""
    views, side = maps.shape[:2]
    cells = side // per_side
    cut = maps.reshape(views, per_side, cells, per_side, cells, -1).transpose(2, 3)
    return cut.reshape(views, per_side**2, cells**2, -1)


def from_windows(tokens: Tensor, per_side: int) -> Tensor:
    """[V, W, cells, E] -> [V, side^2, E]: the map of all windows in raster order; undoes `to_windows`."""
    views, _, cells, width = tokens.shape
    side = math.isqrt(cells)
    cut = tokens.reshape(views, per_side, per_side, side, side, width).transpose(2, 3)
    return cut.reshape(views, (per_side * side) ** 2, width)


class WindowAttention(nn.Module):
    """One (level, scale): queries attend to the features of their own window, then pass an MLP; both residual."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = heads_of(width)
        self.query_norm, self.feature_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, queries: Tensor, features_VNE: Tensor, per_side: int) -> Tensor:
        """queries [V or 1, W, Q, E], features [V, G^2, E] in raster order -> [V, W, Q, E]."""
        views, cells, width = features_VNE.shape
        grid = math.isqrt(cells)
        normed = self.feature_norm(features_VNE).reshape(views, grid, grid, width)
        query = self._split(self.q_proj(self.query_norm(queries)))
        key, value = (self._split(to_windows(proj(normed), per_side)) for proj in (self.k_proj, self.v_proj))
        pooled = F.scaled_dot_product_attention(query.expand(views, -1, -1, -1), key, value)
        pooled = pooled.unflatten(1, (-1, self.heads)).transpose(2, 3).flatten(3)
        hidden = queries + self.out_proj(pooled)
        return hidden + self.fc2(F.gelu(self.fc1(self.mlp_norm(hidden))))

    def _split(self, tokens: Tensor) -> Tensor:
        """[V, W, n, E] -> [V, W * heads, n, head width]: windows beside heads, so that one fused call serves all."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(2, 3).flatten(1, 2)


class ResamplerScale(nn.Module):
    """One scale: its queries as a map over all of its windows, and a `WindowAttention` for each feature level."""

    def __init__(self, width: int, queries: int, num_levels: int):
        super().__init__()
        side = math.isqrt(queries)
        self.queries = nn.Parameter(torch.empty(side, side, width))
        """[S, S, E]: window (i, j) owns the square at (i, j) of P x P squares."""
        self.levels = nn.ModuleList(WindowAttention(width) for _ in range(num_levels))
        self.reset_queries()

    def reset_queries(self) -> None:
        """Fresh queries."""
        nn.init.normal_(self.queries, std=QUERY_STD)

    def forward(self, levels: list[Tensor], per_side: int) -> Tensor:
        """Levels [V, G^2, E], read in turn -> [V, S^2, E], in raster order over the whole map of queries."""
        tokens = to_windows(self.queries.unsqueeze(0), per_side)
        for attend, features_VNE in zip(self.levels, levels, strict=True):
            tokens = attend(tokens, features_VNE, per_side)
        return from_windows(tokens, per_side)


class MultiScaleResampler(Projector):
    """All scales of `mm_projector_type`, concatenated coarse to fine; then a LayerNorm and a Linear E -> C.

    Parameters do not depend on the size of the encoder's grid, nor on the windows: only on the queries of each scale.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        width = config.mm_hidden_size
        num_levels = len(config.mm_vision_feature_levels or [None])
        self.scales = nn.ModuleList(ResamplerScale(width, count, num_levels) for count in query_counts(config))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.hidden_size)

    def tokens_of(self, features: VisionFeatures) -> Tensor:
        """[V, n, C]: tokens of all scales, coarse to fine; within a scale in raster order over its map of queries.

        Raises `UserError` where a scale's windows do not divide the grid, `ValueError` for a grid that is not square.
        """
        levels = features.levels or [features.patches]
        cells = levels[0].shape[1]
        grid = math.isqrt(cells)
        if grid**2 != cells:
            raise ValueError(f"the resampler reads a square grid of features, got {cells}")
        scales = scales_of(self.config, grid)
        tokens = [part(levels, scale.windows_per_side) for part, scale in zip(self.scales, scales, strict=True)]
        return self.proj(self.norm(torch.cat(tokens, dim=1)))

    def adapted(self, weights: Weights, where: str) -> Weights:
        """`weights` as they are, or by compound scaling from a preset with fewer tokens; see `scaling`."""
        config, levels = self.config, len(self.scales[0].levels)  # type: ignore[arg-type]
        scales = scales_of(config, grid_side(config))
        wanted = Wanted(config.mm_projector_type, scales, config.mm_hidden_size, config.hidden_size, levels)
        return scale_weights(weights, where, wanted)

    def reset_projection(self) -> None:
        super().reset_projection()
        for module in self.modules():
            if isinstance(module, ResamplerScale):
                module.reset_queries()
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm) and not name.startswith("summary"):
                module.reset_parameters()
