"""Whether a `Plan` is a whole model of this project: its config holds, and its weights are those the model has.

Called by converting, of what was read and of what was written. No weight is read.
"""

from __future__ import annotations

from typing import Any

from llava_sv.errors import UserError
from llava_sv.model.language_model.decoders import BY_MODEL_TYPE
from llava_sv.model.loading import check_config, strict_config
from llava_sv.release.plan import Plan
from llava_sv.release.wanted import refuse_mismatch, wanted_by


def config_of(plan: Plan) -> Any:
    """The config that a plan's fields make, of its decoder's class; `UserError` for one that cannot be."""
    decoder = BY_MODEL_TYPE[plan.config["model_type"]]
    values = {name: value for name, value in plan.config.items() if name != "model_type"}
    return strict_config(lambda: decoder.config.from_dict(values))


def check_plan(plan: Plan) -> None:
    """`UserError` that names a setting that does not hold, or weights that are missing, too many or misshapen."""
    config = config_of(plan)
    if config.vision_config is None:
        raise UserError(f"checkpoint {plan.source}: names its encoder instead of holding it; give the encoder too")
    try:
        check_config(config, config.vision_config)
    except UserError as error:
        raise UserError(f"checkpoint {plan.source}: {error}") from error
    refuse_mismatch(plan.source, wanted_by(config), {entry.name: entry.shape for entry in plan.entries})
