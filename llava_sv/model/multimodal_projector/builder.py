"""Which projector `mm_projector_type` names: `linear`, `identity` or `mlp{k}x_gelu`."""

from __future__ import annotations

import re
from typing import Any

from llava_sv.errors import UserError
from llava_sv.model.multimodal_projector.mlp import IdentityProjector, LinearProjector, MlpProjector, Projector

PROJECTORS: dict[str, type[Projector]] = {"linear": LinearProjector, "identity": IdentityProjector}


def build_vision_projector(config: Any) -> Projector:
    """A projector with fresh weights; `UserError` lists the known types."""
    name = config.mm_projector_type
    if name in PROJECTORS:
        return PROJECTORS[name](config)
    mlp = re.fullmatch(r"mlp([1-9]\d*)x_gelu", name)
    if mlp:
        return MlpProjector(config, depth=int(mlp.group(1)))
    known = [*PROJECTORS, "mlp{k}x_gelu (mlp2x_gelu, mlp3x_gelu, ...)"]
    raise UserError(f"mm_projector_type: unknown projector {name!r}; known: {', '.join(known)}")
