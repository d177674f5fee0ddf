"""Which way of grouping a family has, looked up by `config.mm_family`. Called by the projectors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llava_sv.errors import UserError
from llava_sv.model.compression.select import VisionFeatures
from llava_sv.model.multimodal_projector.grouping import Projecting, Sizes, group_llava
from llava_sv.model.multimodal_projector.grouping_cos import group_cos
from llava_sv.model.multimodal_projector.grouping_hd import group_llava_hd
from llava_sv.model.token_groups import TokenGroups

Grouping = Callable[[Projecting, Tensor, VisionFeatures, list[int], Sizes], list[TokenGroups]]

GROUPINGS: dict[str, Grouping] = {"llava": group_llava, "llava_hd": group_llava_hd, "cos": group_cos}


def get_grouping(family: str) -> Grouping:
    """Look a family up by its exact name; `UserError` lists the known ones."""
    if family not in GROUPINGS:
        raise UserError(f"mm_family: unknown family {family!r}; known: {', '.join(GROUPINGS)}")
    return GROUPINGS[family]
