"""What `flops` counts of a checkpoint, read off its own config: sizes, views, and tokens of one image by role.

Imports the model, and with it torch: `flops` imports this only where it is given a checkpoint. C LLM width, E encoder
width, N patches of a view, Nr retained, Ns skipped.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from llava_sv.bench.presets import Budget, EncoderSize, LlmSize, Setting
from llava_sv.errors import UserError
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.cos_presets import is_resampler, scales_of
from llava_sv.model.language_model.decoders import model_class
from llava_sv.model.loading import check_config, read_config
from llava_sv.model.multimodal_encoder.builder import read_vision_config
from llava_sv.model.retained_budget import over
from llava_sv.model.token_counts import count_tokens, grid_side, hd_grid, local_cells
from llava_sv.tiling import Size

ENCODERS_WITH_CLS = ("clip_vision_model",)
"""`model_type`s of encoders that run a CLS row beside the patches."""

PARTS = {
    "vision_tower.": "encoder",
    ".summary.": "summaries",
    "mm_projector.": "projector",
    "embed_tokens.": "embedding",
    "lm_head.": "lm_head",
    ".self_attn.": "attention",
    ".mlp.": "ffn",
}
"""What a parameter's name holds -> the part it is of; the first that fits."""


def read_checkpoint(
    folder: str,
    num_retained: int | None = None,
    num_skipped: int | None = None,
    flag: str = "--model-path",
    may_be_dense: bool = False,
    switches: dict[str, Any] | None = None,
) -> Any:
    """The config of the checkpoint in `folder`, its encoder described, its budget replaced where one is given.

    flag: what named the folder; may_be_dense: whether a dense checkpoint needs no budget; switches: further settings of
    `skip_vision` to replace. Raises `UserError` for a folder without a LLaVA's config.json, and a budget that its
    family cannot give.
    """
    if not Path(folder, "config.json").is_file():
        raise UserError(f"{flag} {folder}: no readable config.json there; name a checkpoint's folder")
    config = read_config(folder)
    if config.vision_config is None:
        config.vision_config = read_vision_config(config.mm_vision_tower, config.mm_vision_image_size).to_dict()
    given = {"num_retained": num_retained, "num_skipped": num_skipped}
    given = {name: count for name, count in given.items() if count is not None}
    block = {} if config.skip_vision is None else config.skip_vision.to_dict()
    block |= switches or {}
    needed = 2 if block.get("merge", True) else 1
    if config.skip_vision is None and len(given) < needed and (given or switches or not may_be_dense):
        raise UserError(f"--num-retained and --num-skipped are needed here: {folder} is dense")
    if num_skipped is not None and not block.get("merge", True):
        raise UserError(f"--num-skipped {num_skipped}: {folder} skips without merging, all that is not retained")
    if given or switches:
        config.skip_vision = SkipVisionConfig.from_dict(over(block, given))
        check_config(config, config.vision_config)
    return config


def llm_of(config: Any) -> LlmSize:
    """Sizes of the language model."""
    sizes: dict[str, Any] = {field.name: getattr(config, field.name, None) or 0 for field in fields(LlmSize)}
    return LlmSize(**sizes)


def encoder_of(config: Any) -> EncoderSize:
    """Sizes of the encoder, up to its selected hidden state or the last of its feature levels."""
    vision, layer = config.vision_config, config.mm_vision_select_layer
    blocks = layer if layer >= 0 else vision["num_hidden_layers"] + 1 + layer
    if config.mm_vision_feature_levels:
        blocks = config.mm_vision_feature_levels[-1] + 1
    return EncoderSize(
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_blocks=blocks,
        patch_size=vision["patch_size"],
        patches=config.num_patches,
        has_cls=vision["model_type"] in ENCODERS_WITH_CLS,
        num_layers=vision["num_hidden_layers"],
    )


def projector_depth_of(config: Any) -> int:
    """Linear layers of `identity`, `linear` or `mlp{k}x_gelu`."""
    name = config.mm_projector_type
    if name in ("identity", "linear"):
        return int(name == "linear")
    return int(name.removeprefix("mlp").removesuffix("x_gelu"))


def views_of(config: Any, size: Size | None = None) -> int:
    """Views of one image of `size` that the encoder sees; without a size, the most."""
    if config.mm_family != "llava_hd":
        return 1
    columns, rows = hd_grid(config, size)
    return 1 + columns * rows


def setting_of(config: Any, size: Size | None = None) -> Setting:
    """Views and tokens of an image of `size` (width, height in pixels); without a size, the most of any."""
    counts, dense = count_tokens(config, size), config.dense_tokens_per_image(size)
    shape: dict[str, Any]
    if is_resampler(config.mm_projector_type):
        scales = scales_of(config, grid_side(config))
        windows = tuple((scale.window, scale.queries) for scale in scales)
        shape = {"windows": windows, "levels": len(config.mm_vision_feature_levels or [None])}
    else:
        with_cls = config.mm_vision_select_feature == "cls_patch"
        shape = {"projector_depth": projector_depth_of(config), "projects_cls": with_cls}
    encoder, views = encoder_of(config), views_of(config, size)
    return Setting(encoder, views, dense, counts.retained, counts.skipped, **shape)


def to_merge(config: Any, size: Size | None = None) -> int:
    """Tokens of an image that are not retained, before merging."""
    retained = config.skip_vision.mean_retained
    if config.mm_family == "llava_hd":
        columns, rows = local_cells(config, size)
        return config.num_patches - retained + columns * rows if columns * rows else 0
    dense = copy.copy(config)
    dense.skip_vision = None
    return count_tokens(dense, size).total - retained


def budget_of(config: Any, size: Size | None = None) -> Budget:
    """What the checkpoint's own switches make of an image of `size`; without a size, of the most tokens of any."""
    skip, counts = config.skip_vision, count_tokens(config, size)
    pooled = int(skip.former_summary) * counts.retained + int(skip.latter_summary) * counts.skipped
    return Budget(
        counts.retained,
        counts.skipped,
        counts.summaries,
        pooled,
        merged_from=to_merge(config, size) if skip.merge else 0,
        skipping_layers=len(skip.layers_that_skip(config.num_hidden_layers)),
        last_visual_ffn=skip.last_visual_ffn and counts.skipped > 0,
        fine=counts.fine,
        skip_kv=skip.skip_kv,
        retained_bounds=(skip.retained_min, skip.retained_max) if skip.adaptive else None,
    )


def parameters_of(config: Any) -> dict[str, int]:
    """Part -> parameters of the model that a config describes, counted on the model itself, made without numbers."""
    counts: dict[str, int] = {}
    with torch.device("meta"):
        model = model_class(config)._from_config(config)
    for name, value in model.named_parameters():
        part = next((part for mark, part in PARTS.items() if mark in name), "norms")
        counts[part] = counts.get(part, 0) + value.numel()
    return counts
