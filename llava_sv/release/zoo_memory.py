"""Whether a recipe of the model zoo fits its devices, and how few would do: a stage arrives, GiB leave.

The plan is `train.memory_plan`'s; the base models' configs are written out of `bench.presets`' sizes, so that nothing
is fetched. A sample has one image of most tokens and the text that `max_length` leaves. A plan takes seconds, so those
of zoo.yaml's stages are kept in zoo_memory.json, each beside the flags that it is of. Called by `release.zoo`.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_sv.constants import GIB
from llava_sv.files import read_json, write_json
from llava_sv.release.zoo_recipes import DEVICES, Stage, Zoo

KEPT = Path(__file__).with_name("zoo_memory.json")

HEAD_WIDTH = 64
"""Of CLIP's attention."""

ZERO: dict[str, Any] = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
}
"""What scripts/zero2.json and zero3.json say, as far as memory depends on it; a test compares them."""

COUNTS = (1, 2, 4, 8, 16, 32)
"""Numbers of devices to choose from."""


def zero_config(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration of that stage."""
    known = {name: value for name, value in ZERO.items() if stage == 3 or not name.startswith("stage3_")}
    return {"zero_optimization": {"stage": stage, **known}}


def write_configs(zoo: Zoo, stage: Stage, folder: Path) -> tuple[Path, Path]:
    """config.json of the stage's decoder and of its encoder, as their owners publish them, below `folder`."""
    llm, encoder = stage.llm, stage.setting.encoder
    decoder = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        **{name: value for name, value in vars(llm).items() if name != "head_dim"},
    }
    image = zoo.encoders[stage.encoder].image_size
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": encoder.hidden_size,
        "intermediate_size": encoder.intermediate_size,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.hidden_size // HEAD_WIDTH,
        "patch_size": encoder.patch_size,
        "image_size": image,
        "projection_dim": 768,
    }
    if stage.image_size is None:
        assert math.isqrt(encoder.patches) * encoder.patch_size == image
    for name, config in (("llm", decoder), ("clip", vision)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "llm", folder / "clip"


def plan_of(zoo: Zoo, stage: Stage) -> Any:
    """The `Planner` of the stage's own command on 8 devices."""
    from llava_sv.train.memory_plan import Planner, read

    with tempfile.TemporaryDirectory() as folder:
        llm, clip = write_configs(zoo, stage, Path(folder))
        flags = stage.flags(zoo) | {"model_name_or_path": str(llm), "vision_tower": str(clip)}
        for name in ("deepspeed", "data_path", "image_folder"):
            del flags[name]
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        asked = read([*words, "--world_size", str(DEVICES), "--gpu_memory", "80"])
        asked.deepspeed = zero_config(stage.zero)
        planner = Planner(asked)
        for batch in {1, stage.per_device_batch}:  # while the configs are there
            planner.estimate(planner.layout(), batch, not planner.skips, True)
        return planner


def plan_memory(zoo: Zoo, stage: Stage) -> dict[str, Any]:
    """`gib`: what each of 8 devices needs at the script's batch; `fewest`: GB of a
    card -> how few of them do with one sample at a time (None: more than 32). Texts, as JSON would have them."""
    planner = plan_of(zoo, stage)
    own = planner.layout()
    dense = not planner.skips
    gib = planner.estimate(own, stage.per_device_batch, dense, True).device / GIB
    fewest: dict[str, int | None] = {}
    for label, room in zoo.cards.items():
        enough = [n for n in COUNTS if planner.estimate(replace(own, world=n), 1, dense, True).device / GIB <= room]
        fewest[str(label)] = min(enough, default=None)
    return {
        "gib": round(gib, 2),
        "layout": own.name,
        "fewest": fewest,
    }


def memory_of(zoo: Zoo, stage: Stage) -> dict[str, Any]:
    """`plan_memory` as it was kept, where the stage and the cards are still those; made anew where they are not."""
    asked = what_matters(zoo, stage)
    for kept in read_json(KEPT, "llava-sv zoo --plan-memory") if KEPT.is_file() else []:
        if kept["of"] == asked:
            return kept["memory"]
    return plan_memory(zoo, stage)


def keep_all(zoo: Zoo) -> None:
    """Plan every stage anew and write zoo_memory.json."""
    found: list[dict[str, Any]] = []
    for stage in [*zoo.pretraining.values(), *(one.sft for one in zoo.checkpoints.values())]:
        asked = what_matters(zoo, stage)
        if all(one["of"] != asked for one in found):
            found.append({"of": asked, "memory": plan_memory(zoo, stage)})
    write_json(KEPT, found)


def what_matters(zoo: Zoo, stage: Stage) -> dict[str, str]:
    """The flags that memory depends on, and the cards asked about."""
    ignored = ("data_path", "image_folder", "learning_rate", "num_train_epochs", "version")
    flags = {name: value for name, value in stage.flags(zoo).items() if name not in ignored}
    return flags | {"cards": " ".join(f"{label}={gib}" for label, gib in zoo.cards.items())}
