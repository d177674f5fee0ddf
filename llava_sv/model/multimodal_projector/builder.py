"""Which projector `mm_projector_type` names: `linear`, `identity`, `mlp{k}x_gelu`; for CoS a resampler's preset."""

from __future__ import annotations

import re
from typing import Any

from llava_sv.errors import UserError
from llava_sv.model.cos_presets import CUSTOM, PRESETS, is_resampler
from llava_sv.model.multimodal_projector.mlp import IdentityProjector, LinearProjector, MlpProjector, Projector
from llava_sv.model.multimodal_projector.resampler import MultiScaleResampler

MLP = re.compile(r"mlp([1-9]\d*)x_gelu")
PROJECTORS: dict[str, type[Projector]] = {"linear": LinearProjector, "identity": IdentityProjector}
RESAMPLERS = (*PRESETS, CUSTOM)


def build_vision_projector(config: Any) -> Projector:
    """A projector with fresh weights; `UserError` lists the known types."""
    check_projector_type(config)
    if is_resampler(config.mm_projector_type):
        return MultiScaleResampler(config)
    if config.mm_projector_type in PROJECTORS:
        return PROJECTORS[config.mm_projector_type](config)
    return MlpProjector(config, depth=int(MLP.fullmatch(config.mm_projector_type).group(1)))  # type: ignore[union-attr]


def check_projector_type(config: Any) -> None:
    """`UserError` for an unknown `mm_projector_type`, one of another family, or `identity` between unequal widths."""
    name, family = config.mm_projector_type, config.mm_family
    tokenwise = [*PROJECTORS, "mlp{k}x_gelu (mlp2x_gelu, mlp3x_gelu, ...)"]
    if not (name in PROJECTORS or MLP.fullmatch(name) or is_resampler(name)):
        known = ", ".join([*tokenwise, *RESAMPLERS])
        raise UserError(f"mm_projector_type: unknown projector {name!r}; known: {known}")
    if (family == "cos") != is_resampler(name):
        fit = ", ".join(RESAMPLERS if family == "cos" else tokenwise)
        raise UserError(f"mm_projector_type: {name!r} does not go with family {family!r}, which takes {fit}")
    if name == "identity" and config.mm_hidden_size != config.hidden_size:
        raise UserError(
            f"mm_projector_type: 'identity' needs equal widths, but the encoder has {config.mm_hidden_size} and the "
            f"language model {config.hidden_size}; use mlp2x_gelu"
        )
