"""Peak memory of a prefill and of a training step, dense against skipping: `llava-sv flops --memory`.

A `Question` arrives; bytes by part leave. Both are run on tensors without numbers (`ghost`, `memory_trace`): what the
real code keeps, and when, is what is counted. Training is one process without DeepSpeed, float32 weights and AdamW,
with autocast to the precision asked for; `llava-sv doctor --plan` plans other layouts.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from llava_sv.bench.counts import SIDES, Question
from llava_sv.bench.ghost import Ghost
from llava_sv.bench.memory_states import Layout, estimate
from llava_sv.bench.memory_trace import Work, build, make_inputs, trace
from llava_sv.bench.models import freeze_encoder, make_config
from llava_sv.bench.presets import FAMILIES, Budget, Setting
from llava_sv.bench.sizes import BenchSize
from llava_sv.errors import UserError

HEAD_WIDTH = 64
"""Of CLIP's attention."""

MOST = "activations, at their most"
"""Key of what the worst moment need not have: it may come when gradients have taken the activations' place."""


def footprint(question: Question) -> dict[str, dict[str, dict[str, int]]]:
    """`{"prefill": {"dense", "skip"}, "training": {...}}`: bytes at the worst moment by part, and their `total`.

    Raises `UserError` for dense tokens that are not the preset's, and for text too short to train on.
    """
    if question.text_tokens < 2:
        raise UserError(f"--text-tokens {question.text_tokens}: --memory trains on 2 or more")
    configs = configs_of(question)
    return {
        "prefill": {name: prefill_bytes(configs[name], question) for name in SIDES},
        "training": {name: training_bytes(configs[name], question) for name in SIDES},
    }


def configs_of(question: Question) -> dict[str, Any]:
    """The models' configs: a checkpoint's own, and the same without skipping; or those of a preset."""
    if question.config is not None:
        dense = copy.copy(question.config)
        dense.skip_vision = None
        return {"dense": dense, "skip": question.config}
    family, setting = question.family, question.setting
    if question.preset is None or setting.dense_tokens != FAMILIES[family][question.preset].dense_tokens:
        raise UserError(f"--dense-tokens {setting.dense_tokens}: --memory runs the preset's own; leave it out")
    size = BenchSize(
        question.llm,
        _vision_of(setting),
        question.batch,
        question.text_tokens,
        question.budget.retained,
        question.budget.skipped,
        question.new_tokens,
        repeats=1,
        family=family,
        settings=_settings_of(question),
    )
    block = _skip_vision_of(question.budget, question.skipping_layers)
    return {"dense": make_config(size, None), "skip": make_config(size, block)}


def _vision_of(setting: Setting) -> dict[str, Any]:
    """Fields of a CLIP's config."""
    encoder = setting.encoder
    return {
        "hidden_size": encoder.hidden_size,
        "intermediate_size": encoder.intermediate_size,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.hidden_size // HEAD_WIDTH,
        "image_size": math.isqrt(encoder.patches) * encoder.patch_size,
        "patch_size": encoder.patch_size,
    }


def _settings_of(question: Question) -> dict[str, Any]:
    """What a family's config says besides."""
    if question.family == "llava_hd":
        return {"hd_fixed_grid": question.preset}
    if not question.setting.windows:
        return {}
    last = question.setting.encoder.num_blocks - 1
    levels = [last - 7 * (question.setting.levels - 1 - level) for level in range(question.setting.levels)]
    return {"mm_projector_type": question.preset, "mm_vision_feature_levels": levels}


def _skip_vision_of(budget: Budget, layers: int) -> dict[str, Any]:
    former = budget.pooled >= budget.retained and budget.pooled != budget.skipped
    return {
        "num_retained": budget.retained,
        "num_skipped": budget.skipped,
        "merge": budget.merged_from > 0 or not budget.skipped,
        "former_summary": budget.summaries == 2 or (budget.summaries == 1 and former),
        "latter_summary": budget.summaries == 2 or (budget.summaries == 1 and not former),
        "last_visual_ffn": budget.last_visual_ffn,
        "skip_ffn": layers > 0,
        "skip_layers": list(range(layers)) or "all",
        "skip_kv": budget.skip_kv,
    }


def prefill_bytes(config: Any, question: Question) -> dict[str, int]:
    """Weights, and the most that images, activations and cache take beside them, the cache's removal included."""
    dtype = getattr(torch, question.dtype)
    work = Work(question.batch, question.text_tokens, weights=dtype)
    with Ghost() as ghost, torch.no_grad():
        model = build(config, dtype, ghost, lambda model: model).eval()
        weights, peak = ghost.total, 0

        def watch() -> None:
            nonlocal peak
            peak = max(peak, ghost.total - weights)

        ghost.on_change = watch
        inputs = make_inputs(config, work)
        del inputs["labels"]
        inputs["images"] = [image.to(dtype) for image in inputs["images"]]
        ids = inputs.pop("input_ids")
        model.generate(ids, **inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
    return {"weights": weights, "activations and cache": peak, "total": weights + peak}


def training_bytes(config: Any, question: Question) -> dict[str, int]:
    """One step, forward, backward and optimizer, at its worst moment."""
    autocast = None if question.dtype == "float32" else getattr(torch, question.dtype)
    work = Work(question.batch, question.text_tokens, autocast=autocast, checkpointing=question.recompute)

    def prepare(model: Any) -> Any:
        if question.trains == "sft":
            return freeze_encoder(model, question.family)
        model.requires_grad_(False)
        model.get_model().mm_projector.requires_grad_(True)
        return model

    step = trace(config, work, prepare, lambda name: "model")
    found = estimate(step, Layout(), 4, accumulating=False)
    most = max(moment.activations for moment in step.moments)
    return {**found.parts, "total": found.tensors, MOST: most}
