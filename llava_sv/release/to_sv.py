"""A `Plan` written as a checkpoint of this project. Called by converting."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_sv.model.language_model.decoders import BY_MODEL_TYPE
from llava_sv.release.check_plan import config_of
from llava_sv.release.plan import Plan
from llava_sv.release.tokenizer_files import write_chat_template, write_generation, write_tokenizer
from llava_sv.release.weights import write_weights


def write(plan: Plan, folder: Path, shard_bytes: int | None, dtype: torch.dtype | None) -> None:
    """Fill `folder`: config, weights, tokenizer, image processor, as training leaves them."""
    config = config_of(plan)
    config.architectures = [BY_MODEL_TYPE[plan.config["model_type"]].model.__name__]
    config.save_pretrained(folder)
    write_tokenizer(plan, folder)
    write_chat_template(plan, folder)
    write_generation(plan, folder)
    plan.image_processor.save_pretrained(folder)
    write_weights(folder, plan.entries, shard_bytes, dtype)
