"""Which projector `mm_projector_type` names: `linear`, `identity` or `mlp{k}x_gelu`."""

from __future__ import annotations

import re
from typing import Any

from llava_sv.errors import UserError
from llava_sv.model.multimodal_projector.mlp import IdentityProjector, LinearProjector, MlpProjector, Projector

MLP = re.compile(r"mlp([1-9]\d*)x_gelu")
PROJECTORS: dict[str, type[Projector]] = {"linear": LinearProjector, "identity": IdentityProjector}


def build_vision_projector(config: Any) -> Projector:
    """A projector with fresh weights; `UserError` lists the known types."""
    check_projector_type(config)
    if config.mm_projector_type in PROJECTORS:
        return PROJECTORS[config.mm_projector_type](config)
    return MlpProjector(config, depth=int(MLP.fullmatch(config.mm_projector_type).group(1)))  # type: ignore[union-attr]


def check_projector_type(config: Any) -> None:
    """`UserError` for an unknown `mm_projector_type`, or `identity` between unequal widths."""
    name = config.mm_projector_type
    if name == "identity" and config.mm_hidden_size != config.hidden_size:
        raise UserError(
            f"mm_projector_type: 'identity' needs equal widths, but the encoder has {config.mm_hidden_size} and the "
            f"language model {config.hidden_size}; use mlp2x_gelu"
        )
    if name in PROJECTORS or MLP.fullmatch(name):
        return
    known = [*PROJECTORS, "mlp{k}x_gelu (mlp2x_gelu, mlp3x_gelu, ...)"]
    raise UserError(f"mm_projector_type: unknown projector {name!r}; known: {', '.join(known)}")
