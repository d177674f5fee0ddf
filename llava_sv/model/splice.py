"""Laying each image's tokens into its place in the text: ids and `TokenGroups` in, one `SplicedBatch` out.

Called by `llava_arch`. B batch, T spliced length, C width.
The layout depends on lengths alone; one gather moves the data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_sv.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_sv.model.token_groups import TokenGroups, TokenRole

logger = logging.getLogger(__name__)

PADDING_SIDES = ("left", "right")


@dataclass
class SplicedBatch:
    """What the decoder reads. inputs_embeds [B, T, C]; attention_mask bool [B, T]; position_ids [B, T] count each
    sample's own sequence from 0; token_roles int8 [B, T]; labels [B, T] or None.

    sample_lengths: positions of each sample of each row, where rows are packs of several samples; else None."""

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    token_roles: Tensor
    labels: Tensor | None = None
    sample_lengths: list[list[int]] | None = None


@dataclass
class Segment:
    """A stretch of one sample: `length` rows of the flat buffer from `start`."""

    start: int
    length: int
    is_image: bool


def splice(
    input_ids: Tensor,
    groups: list[TokenGroups],
    embed_tokens: Callable[[Tensor], Tensor],
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    max_length: int | None = None,
    padding_side: str = "right",
    packs: list[int] | None = None,
) -> SplicedBatch:
    """Replace each `IMAGE_TOKEN_INDEX` by its image's tokens, in order of appearance over the batch.

    input_ids [B, T0], padded on either side as `attention_mask` [B, T0] says; labels [B, T0]. A sample longer than
    `max_length` is cut; a cut that would fall inside an image falls before it. Raises `ValueError` where the number of
    image marks is not the number of images.

    packs: how many samples, one after another, share each row of what comes out (B is their number then); their
    positions restart, and no sample has to foretell the next one's first token.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    # read by the host in one go: every look at a GPU's tensor waits for all that was asked of it before
    marks_here, real_here = torch.stack([(input_ids == IMAGE_TOKEN_INDEX) & real, real]).cpu()
    per_sample = [ids[mask].tolist() for ids, mask in zip(marks_here, real_here)]
    count_marks = sum(sum(sample) for sample in per_sample)
    if count_marks != len(groups):
        raise ValueError(f"the prompts hold {count_marks} <image> mark(s), but {len(groups)} image(s) were given")

    text_places = (real_here & ~marks_here).flatten().nonzero().flatten().to(input_ids.device)
    text = embed_tokens(input_ids.flatten()[text_places])
    labels = None if labels is None else labels.to(text.device)
    whole = _segments(per_sample, [len(group) for group in groups], first_visual_row=text.shape[0])
    samples = [list(_rows(_cut(sample, max_length))) for sample in whole]
    rows = samples if packs is None else _joined(samples, packs, padding_side)
    width = max(max(map(len, rows)), 1)
    flat = torch.cat([text, *(g.tokens.to(text) for g in groups), text.new_zeros(1, text.shape[-1])])
    index = _padded(rows, width, pad=flat.shape[0] - 1, side=padding_side).to(flat.device)

    text_roles = torch.full((text.shape[0],), int(TokenRole.TEXT), dtype=torch.int8, device=flat.device)
    pad_role = text_roles.new_full((1,), int(TokenRole.PAD))
    roles = torch.cat([text_roles, *(g.roles.to(text_roles) for g in groups), pad_role])[index]
    mask = roles != TokenRole.PAD
    spliced_labels = None
    if labels is not None:
        flat_labels = labels.new_full((flat.shape[0],), IGNORE_INDEX)
        flat_labels[: text.shape[0]] = labels.flatten()[text_places.to(labels.device)]
        if any(len(kept) < sum(s.length for s in sample) for kept, sample in zip(samples, whole)):
            before = labels.masked_fill(~real.to(labels.device), IGNORE_INDEX)
            _say_lost_answers(before, [flat_labels[kept] for kept in samples], max_length)
        if packs is not None:
            flat_labels[[kept[0] for kept in samples if kept]] = IGNORE_INDEX
        spliced_labels = flat_labels[index]
    embeds = flat.index_select(0, index.flatten()).view(*index.shape, flat.shape[-1])
    if packs is None:
        position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return SplicedBatch(embeds, mask, position_ids, roles, spliced_labels)
    left = iter(samples)
    lengths = [[len(next(left)) for _ in range(count)] for count in packs]
    return SplicedBatch(embeds, mask, _restarting(lengths, width).to(index.device), roles, spliced_labels, lengths)


def _joined(samples: list[list[int]], packs: list[int], padding_side: str) -> list[list[int]]:
    """The samples' rows, joined pack by pack."""
    if padding_side != "right":
        raise ValueError("packs are padded on the right")
    if sum(packs) != len(samples):
        raise ValueError(f"packs of {packs} samples, but {len(samples)} were given")
    left = iter(samples)
    return [[row for _ in range(count) for row in next(left)] for count in packs]


def _restarting(lengths: list[list[int]], width: int) -> Tensor:
    """[B, width] positions that count each sample, and the padding of each row, from 0."""
    rows = [[*row, width - sum(row)] for row in lengths]
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def labels_after_cut(
    input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None, lengths: list[int], max_length: int | None
) -> Tensor:
    """labels [B, T0] as far as `splice` keeps them; `IGNORE_INDEX` beyond the cut.

    lengths: tokens of each image, in order. What normalises a loss must count these, not what was cut away.
    """
    if max_length is None or input_ids.shape[1] + sum(lengths) <= max_length:
        return labels
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    per_sample = [(ids[mask] == IMAGE_TOKEN_INDEX).tolist() for ids, mask in zip(input_ids, real)]
    samples = _segments(per_sample, lengths, first_visual_row=0)
    kept = [sum(1 if s.is_image else s.length for s in _cut(sample, max_length)) for sample in samples]
    place = real.long().cumsum(dim=1) - 1  # of each real position in its own prompt
    beyond = place >= torch.tensor(kept, device=place.device).unsqueeze(1)
    return labels.masked_fill(beyond.to(labels.device), IGNORE_INDEX)


def _segments(per_sample: list[list[bool]], lengths: list[int], first_visual_row: int) -> list[list[Segment]]:
    """Each sample as stretches of text and images, in the rows of the flat buffer (all text first, then all images)."""
    text_row, visual_row = 0, first_visual_row
    left = iter(lengths)
    samples = []
    for sample in per_sample:
        segments: list[Segment] = []
        for is_image in sample:
            if is_image:
                length = next(left)
                segments.append(Segment(visual_row, length, True))
                visual_row += length
            else:
                if not segments or segments[-1].is_image:
                    segments.append(Segment(text_row, 0, False))
                segments[-1].length += 1
                text_row += 1
        samples.append(segments)
    return samples


def _cut(segments: list[Segment], max_length: int | None) -> list[Segment]:
    """The sample's first `max_length` rows, without a part of an image."""
    if max_length is None:
        return segments
    kept, room = [], max_length
    for segment in segments:
        if segment.length > room:
            if not segment.is_image and room:
                kept.append(Segment(segment.start, room, False))
            break
        kept.append(segment)
        room -= segment.length
    return kept


def _rows(segments: list[Segment]) -> Iterator[int]:
    for segment in segments:
        yield from range(segment.start, segment.start + segment.length)


def _padded(rows: list[list[int]], width: int, pad: int, side: str) -> Tensor:
    """[B, width] index, padded with `pad` on `side`."""
    if side not in PADDING_SIDES:
        raise ValueError(f"padding side {side!r} is unknown; known: {', '.join(PADDING_SIDES)}")
    fill = [[pad] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if side == "left" else r + f for r, f in zip(rows, fill)], dtype=torch.long)


def _say_lost_answers(before: Tensor, after: list[Tensor], max_length: int | None) -> None:
    """before: labels [B, T0] of whole samples; after: what is left of each."""
    lost = [
        index
        for index, (whole, left) in enumerate(zip(before, after))
        if bool((whole != IGNORE_INDEX).any()) and not bool((left != IGNORE_INDEX).any())
    ]
    if lost:
        logger.warning(
            "%d sample(s) of this batch (at %s) lost their whole answer when cut to %s tokens; raise model_max_length",
            len(lost),
            lost,
            max_length,
        )
