"""Whether a `Plan` is a whole model of this project: its config holds, and its weights are those the model has.

Called by converting, of what was read and of what was written. No weight is read.
"""

from __future__ import annotations

from typing import Any

import torch

from llava_sv.errors import UserError
from llava_sv.model.language_model.decoders import BY_MODEL_TYPE
from llava_sv.model.loading import check_config, strict_config
from llava_sv.release.plan import Plan


def config_object(values: dict[str, Any]) -> Any:
    """The config of these values, of its decoder's class. Raises `UserError`."""
    decoder = BY_MODEL_TYPE[values["model_type"]]
    return strict_config(lambda: decoder.config.from_dict({k: v for k, v in values.items() if k != "model_type"}))


def check_plan(plan: Plan) -> None:
    """`UserError` that names a setting that does not hold, or weights that are missing, too many or misshapen."""
    config = config_object(plan.config)
    if config.vision_config is None:
        raise UserError(f"checkpoint {plan.source}: names its encoder instead of holding it; give the encoder too")
    try:
        check_config(config, config.vision_config)
    except UserError as error:
        raise UserError(f"checkpoint {plan.source}: {error}") from error
    with torch.device("meta"):
        model: Any = BY_MODEL_TYPE[plan.config["model_type"]].model(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {entry.name: entry.shape for entry in plan.entries}
    missing = [name for name in wanted if name not in found]
    if config.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    extra = [name for name in found if name not in wanted]
    other = [name for name in found if name in wanted and found[name] != wanted[name]]
    for names, what in ((missing, "lacks"), (extra, "has, unlike its config,"), (other, "has in another shape")):
        if names:
            shapes = f" ({list(found[names[0]])}, its config says {list(wanted[names[0]])})" if names is other else ""
            raise UserError(
                f"checkpoint {plan.source}: {what} {len(names)} weight(s): {_some(names)}{shapes}; does config.json "
                "belong to these weights?"
            )


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
