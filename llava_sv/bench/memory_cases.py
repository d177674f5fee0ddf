"""Small runs whose memory is both planned and measured: `bench memory` and the tests go through them.

A `Case` is a model of 8 million parameters, what trains of it, a batch, a precision and a layout over processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from llava_sv.bench.memory_states import Estimate, Layout, estimate, layout_of
from llava_sv.bench.memory_trace import Work, trace
from llava_sv.bench.models import make_config
from llava_sv.bench.presets import LlmSize
from llava_sv.bench.sizes import BenchSize
from llava_sv.model import adapters

TEXT = 256
WIDTH = 256
VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 168,
    "patch_size": 14,
}
LLM = LlmSize(WIDTH, 896, 4, 4, 2, 8192)
SETTINGS: dict[str, dict[str, Any]] = {
    "llava": {},
    "llava_hd": {"hd_fixed_grid": "2x2"},
    "cos": {
        "mm_projector_type": "cos",
        "cos_windows": [12, 4, 2],
        "cos_queries": [4, 36, 144],
        "mm_vision_feature_levels": [1, 2],
    },
}
BUDGETS = {"llava": (24, 40), "llava_hd": (144, 144), "cos": (40, 36)}
"""Retained and skipped tokens of 144, 720 and 184 an image."""

PRECISIONS = ("fp32", "bf16")
LAYOUTS = ("one process", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
TRAINED = ("all", "with encoder", "projector", "LoRA")


@dataclass(frozen=True)
class Case:
    """One run. trained: a name of `TRAINED`; layout: of `LAYOUTS`, two processes but for the first."""

    family: str = "llava"
    skips: bool = False
    checkpointing: bool = False
    batch: int = 1
    trained: str = "all"
    precision: str = "fp32"
    layout: str = "one process"
    accumulating: bool = False

    @property
    def name(self) -> str:
        """A line's head."""
        words = [self.family, "skipping" if self.skips else "dense", f"batch {self.batch}", self.precision]
        words += ["checkpointing"] if self.checkpointing else []
        words += ["accumulating"] if self.accumulating else []
        return ", ".join([*words, self.trained, self.layout])

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        """DeepSpeed's configuration: that of scripts/zero2.json and zero3.json, filled in as transformers does."""
        if not self.layout.startswith("ZeRO"):
            return None
        zero: dict[str, Any] = {
            "stage": int(self.layout[-1]),
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": WIDTH**2,
        }
        if zero["stage"] == 3:
            zero |= {
                "stage3_prefetch_bucket_size": int(0.9 * WIDTH**2),
                "stage3_param_persistence_threshold": 10 * WIDTH,
                "stage3_max_live_parameters": 1e9,
                "stage3_max_reuse_distance": 1e9,
            }
        return {
            "train_micro_batch_size_per_gpu": self.batch,
            "gradient_accumulation_steps": 1 + self.accumulating,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": self.precision == "bf16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }

    @property
    def world(self) -> int:
        """Processes."""
        return 1 if self.layout == "one process" else 2

    def config(self) -> Any:
        """The model's config, made anew."""
        retained, skipped = BUDGETS[self.family]
        size = BenchSize(LLM, VISION, self.batch, TEXT, retained, skipped, 1, 1, self.family, SETTINGS[self.family])
        return make_config(size, {"num_retained": retained, "num_skipped": skipped} if self.skips else None)

    def work(self) -> Work:
        """Precision as training chooses it: DeepSpeed narrows the weights, elsewhere autocast the computation."""
        narrow = torch.bfloat16 if self.precision == "bf16" else None
        weights = narrow if narrow and self.deepspeed else torch.float32
        return Work(
            self.batch,
            TEXT,
            weights=weights,
            autocast=None if self.deepspeed else narrow,
            checkpointing=self.checkpointing,
            accumulating=self.accumulating,
        )

    def prepare(self, model: Any) -> Any:
        """What trains."""
        tower, projector = model.get_vision_tower(), model.get_model().mm_projector
        if self.trained == "LoRA":
            model = with_lora(model)
        if self.trained == "projector":
            model.requires_grad_(False)
        tower.requires_grad_(False)
        projector.requires_grad_(True)
        if self.trained == "with encoder":
            for parameter, _ in tower.used_parameters().values():
                parameter.requires_grad_(True)
        return model


def with_lora(model: Any) -> Any:
    """Adapters on every linear layer of the decoder, as training puts them there; the rest of it frozen."""
    adapters.inject(model, adapters.make_config(16, 32, 0.05, "none", adapters.linear_names(model), base=""))
    return model


def plan_of(case: Case) -> Estimate:
    """What the plan says."""
    work = case.work()
    found = trace(case.config(), work, case.prepare, lambda name: "model")
    layout = layout_of(case.deepspeed, case.world, WIDTH) if case.deepspeed else Layout(world=case.world)
    return estimate(found, layout, work.weights.itemsize, work.accumulating)


def every_case() -> Iterator[Case]:
    """All runs of one process in the table."""
    for family, skips, checkpointing in itertools.product(SETTINGS, (False, True), (False, True)):
        base = Case(family, skips, checkpointing)
        for batch, trained in itertools.product((1, 4), ("all", "with encoder")):
            yield replace(base, batch=batch, precision=PRECISIONS[(batch == 4) ^ (trained == "all")], trained=trained)
        yield replace(base, batch=2, accumulating=True)
        yield replace(base, batch=4, trained="LoRA", precision="bf16")
        yield replace(base, batch=2, trained="projector")


def ranked_cases() -> Iterator[Case]:
    """Runs over two processes."""
    for layout, precision in itertools.product(LAYOUTS[1:], PRECISIONS):
        yield Case("llava_hd", checkpointing=True, precision=precision, layout=layout)
        yield Case("cos", skips=True, batch=2, precision=precision, layout=layout, trained="with encoder")
    for layout in LAYOUTS[1:]:
        yield Case(skips=True, batch=2, checkpointing=True, precision="bf16", layout=layout, trained="LoRA")
    for layout in LAYOUTS[2:]:
        yield Case(batch=1, accumulating=True, precision="bf16", layout=layout)
