"""The LLaVA-HD family's grouping: the overview is retained, all tiles' tokens are merged together and skipped.

V views of all images, N patches a view, C LLM width; an image's first view is its overview. Tile counts differ.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_sv.model.compression.adaptive import choose_counts, raster_split
from llava_sv.model.compression.merge import merge_tokens
from llava_sv.model.compression.select import VisionFeatures, gather_tokens, get_selector, split_by_score
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.multimodal_projector.grouping import Parts, Projecting, Sizes, between
from llava_sv.model.token_counts import grid_side, hd_grid
from llava_sv.model.token_groups import TokenGroups, TokenRole, role_row
from llava_sv.tiling import ANYRES, unpadded


def group_llava_hd(
    owner: Projecting, tokens: Tensor, features: VisionFeatures, views_per_image: list[int], sizes: Sizes
) -> list[TokenGroups]:
    """[overview][former summary][merged tiles][latter summary]; dense: [overview][tile][tile]..., all retained.

    With fewer than N retained, the overview's other patches are merged with the tiles'. An image without tiles keeps
    its whole overview and has nothing to skip. tokens: [V, N, C].
    """
    _check(owner, views_per_image)
    images = list(tokens.split(views_per_image))
    local = [tiles_of(owner, views, None if sizes is None else sizes[i]) for i, views in enumerate(images)]
    if owner.skip is None:
        return _dense(owner, images, local)
    overview = torch.stack([views[0] for views in images])
    retained, local = _split_overview(owner, overview, features, views_per_image, local)
    return _skipping(owner, retained, local)


def _check(owner: Projecting, views_per_image: list[int]) -> None:
    config = owner.config
    if config.image_aspect_ratio == ANYRES:
        return
    columns, rows = hd_grid(config, None)
    which = f"hd_fixed_grid {config.hd_fixed_grid}" if config.hd_fixed_grid else f"hd_max_tiles {config.hd_max_tiles}"
    for index, views in enumerate(views_per_image):
        if views - 1 > columns * rows:
            raise ValueError(f"image {index} comes in {views - 1} tiles, but {which} allows {columns * rows}")


def tiles_of(owner: Projecting, views: Tensor, size: tuple[int, int] | None) -> Tensor:
    """The tiles' tokens of one image, tile by tile: [tiles, N, C] -> [n, C]; `anyres`: as one map [rows, columns, C]
    without the padding."""
    config = owner.config
    if config.image_aspect_ratio != ANYRES or views.shape[0] == 1:
        return views[1:].flatten(0, 1)
    if size is None:
        raise ValueError("image_aspect_ratio 'anyres' needs image_sizes, (width, height) of each image")
    side, (columns, rows) = grid_side(config), hd_grid(config, size)
    if columns * rows != views.shape[0] - 1:
        raise ValueError(f"an image of {size} makes {columns} x {rows} tiles, but {views.shape[0] - 1} were given")
    tiles = views[1:].reshape(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
    left, top, right, bottom = unpadded(size, (columns * side, rows * side))
    return tiles[top:bottom, left:right]


def _dense(owner: Projecting, images: list[Tensor], local: list[Tensor]) -> list[TokenGroups]:
    newline = owner.image_newline
    groups = []
    for views, rest in zip(images, local):
        if rest.dim() == 3 and newline is not None:
            ends = newline.to(rest).expand(rest.shape[0], 1, -1)
            rest = torch.cat([rest, ends], dim=1).flatten(0, 1)
        overview = views[0] if newline is None else views[0] + 0.0 * newline.sum().to(views)
        groups.append(_group([(TokenRole.RETAINED, overview), (TokenRole.RETAINED, rest)]))
    return groups


def _split_overview(
    owner: Projecting, overview: Tensor, features: VisionFeatures, views_per_image: list[int], local: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Retained tokens of each image [n, C], and those to merge [n, C]."""
    skip = owner.skip
    assert skip is not None
    local = [tokens.reshape(-1, tokens.shape[-1]) for tokens in local]
    if skip.mean_retained >= overview.shape[1]:
        return list(overview), local
    starts = torch.tensor(views_per_image).cumsum(0) - torch.tensor(views_per_image)
    scores = get_selector(skip.selection)(features.rows(starts.to(overview.device)))
    if skip.adaptive:
        return _split_by_content(skip, overview, scores, local)
    keep_index, rest_index = split_by_score(scores, skip.mean_retained)
    kept, rest = gather_tokens(overview, keep_index), gather_tokens(overview, rest_index)
    retained = [kept[i] if len(tokens) else overview[i] for i, tokens in enumerate(local)]
    local = [torch.cat([rest[i], tokens]) if len(tokens) else tokens for i, tokens in enumerate(local)]
    return retained, local


def _split_by_content(
    skip: SkipVisionConfig, overview: Tensor, scores: Tensor, local: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same where each image's content says how much of its overview is retained."""
    counts = choose_counts(scores, skip)
    in_order = gather_tokens(overview, raster_split(scores, counts))
    retained, rest = list(overview), list(local)
    for i, (count, tokens) in enumerate(zip(counts.tolist(), local)):
        if len(tokens):
            retained[i], rest[i] = in_order[i, :count], torch.cat([in_order[i, count:], tokens])
    return retained, rest


def _skipping(owner: Projecting, retained: list[Tensor], local: list[Tensor]) -> list[TokenGroups]:
    skip, summary = owner.skip, owner.summary
    assert skip is not None
    assert summary is not None
    skipped, mask = _padded(local)  # real rows come first, and stay first after merging
    if skip.merge:
        most, own = int(skip.num_skipped or 0), None
        if skip.adaptive:  # as many more as fewer are retained
            own = torch.tensor([skip.mean_retained + most - len(kept) for kept in retained], device=mask.device)
            most += skip.mean_retained - int(skip.retained_min or 0)
        skipped, mask = merge_tokens(skipped, most, mask, own)
    counts = mask.sum(1).tolist()
    former = None if summary.former is None else summary.former(*_padded(retained))
    # a group without local tokens still runs the latter summary, over one zero row: every weight is used on every rank
    latter = None
    if summary.latter is not None:
        first = torch.zeros_like(mask)
        first[:, 0] = ~mask.any(1)
        latter = summary.latter(skipped, mask | first)
    groups = []
    for i, count in enumerate(counts):
        kept: Parts = [(TokenRole.RETAINED, retained[i])]
        own_former = None if former is None else former[i]
        if count:
            own_latter = None if latter is None else latter[i]
            groups.append(_group(between(kept, own_former, skipped[i, :count], own_latter, skip)))
            continue
        if latter is not None:
            kept = [(TokenRole.RETAINED, retained[i] + 0.0 * latter[i].sum())]
        if own_former is not None:
            kept.append((TokenRole.SUMMARY, own_former.unsqueeze(0)))
        groups.append(_group(kept))
    return groups


def _padded(groups: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[n_i, C] each -> [G, max n, C] padded with zeros, and bool [G, max n]; at least one column."""
    lengths = torch.tensor([len(group) for group in groups], device=groups[0].device)
    padded = pad_sequence(groups, batch_first=True)
    if padded.shape[1] == 0:
        padded = groups[0].new_zeros(len(groups), 1, groups[0].shape[-1])
    return padded, torch.arange(padded.shape[1], device=padded.device)[None, :] < lengths[:, None]


def _group(parts: Parts) -> TokenGroups:
    roles = role_row([(role, part.shape[0]) for role, part in parts], parts[0][1].device)
    return TokenGroups(torch.cat([part for _, part in parts]), roles)
