"""This project's own checkpoints as a `Plan`. Called by converting."""

from __future__ import annotations

from pathlib import Path

from llava_sv.errors import UserError
from llava_sv.mm_utils import load_image_processor
from llava_sv.model.builders.tokenizer import read_tokenizer
from llava_sv.model.loading import read_config
from llava_sv.release.layouts import read_values
from llava_sv.release.plan import Plan
from llava_sv.release.weights import open_weights


def read(source: Path) -> Plan:
    """The whole checkpoint at `source`. Raises `UserError` for what is broken."""
    values = read_values(source)
    config = read_config(str(source))
    made = config.to_dict()
    made.pop("transformers_version", None)
    made |= {name: values.get(name) for name in ("architectures", "dtype")}
    if config.vision_config is None:
        raise UserError(f"{source}: names its encoder instead of holding it, which only LLaVA's own layout may")
    image_processor = load_image_processor(str(source), config.mm_vision_image_size)
    return Plan(source, "sv", made, open_weights(source), read_tokenizer(str(source)), image_processor)
