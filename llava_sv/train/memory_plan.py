"""`llava-sv doctor --plan`: what a training command needs of each device's memory, before it is started.

Takes training's own flags; reads configs only, no weights and no data. `PLAN=1 bash scripts/...` comes here too.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from llava_sv.constants import GIB
from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.files import write_json
from llava_sv.train.memory_model import model_config, prepare, saved_by_bits

EXAMPLE = """example:
  llava-sv doctor --plan --model_name_or_path playground/tiny/llm --vision_tower playground/tiny/clip \\
      --version llama_3 --world_size 8 --gpu_memory 80 --deepspeed scripts/zero3.json --bf16 True
  PLAN=1 bash scripts/v1_5/finetune_skip.sh"""

USUAL = 80
"""GiB of a GPU's memory where there is none here and none is said."""

POWERS = [2**power for power in range(9)]
"""Batches to choose from."""

CHECKPOINTING = "gradient_checkpointing"
PER_DEVICE = "per_device_train_batch_size"

STAGES: tuple[tuple[int | None, bool], ...] = ((None, False), (1, False), (2, False), (2, True), (3, False), (3, True))
"""(ZeRO stage, whether on the host what can be): rows of the table."""


@dataclass
class Asked:
    """A training command, as far as memory depends on it."""

    model_args: Any
    values: SimpleNamespace
    deepspeed: dict[str, Any] | None
    world: int
    memory: float
    memory_from: str
    text_tokens: int | None
    global_batch: int | None

    @property
    def batch(self) -> int | None:
        """Samples a device, or None where it is to be found."""
        value = self.values.per_device_train_batch_size
        return None if value == "auto" else int(value)


def read(argv: list[str]) -> Asked:
    """A command line to what is asked; `UserError` for what cannot be read. No device is looked for."""
    from llava_sv.arguments import ModelArguments
    from llava_sv.train import flags
    from llava_sv.train.distributed import read_config

    own, rest = _own_parser().parse_known_args(argv)
    translated, _ = flags.translate(rest)
    others, batch = flags.without(translated, (PER_DEVICE,))
    auto = batch.get(PER_DEVICE) == ["auto"]
    translated = others if auto else translated
    flags.check_known(translated)
    values = SimpleNamespace(**vars(flags.Parser().parse_args(translated)))
    if auto:
        values.per_device_train_batch_size = "auto"
    names = {item.name for item in fields(ModelArguments) if item.init}
    model_args = ModelArguments(**{name: value for name, value in vars(values).items() if name in names})
    if not model_args.model_name_or_path:
        raise UserError("--model_name_or_path is needed: a folder or Hugging Face id whose config.json is here")
    if own.world_size < 1:
        raise UserError(f"--world_size {own.world_size}: at least one process is needed")
    memory, where = _device_memory(own.gpu_memory)
    deepspeed = read_config(values.deepspeed) if values.deepspeed else None
    return Asked(model_args, values, deepspeed, own.world_size, memory, where, own.text_tokens, own.global_batch_size)


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-sv doctor --plan",
        description="Say what a training command needs of each device's memory. Takes training's flags, and these:",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--world_size", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="processes [1]")
    parser.add_argument("--gpu_memory", type=float, help="GiB of a device [this machine's GPU, else 80]")
    parser.add_argument("--text_tokens", type=int, help="text of a sample [what --model_max_length leaves]")
    parser.add_argument("--global_batch_size", type=int, help="samples of an optimizer step, to be kept [the flags']")
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON")
    return parser


def _device_memory(given: float | None) -> tuple[float, str]:
    """(GiB of a device, where that is from)."""
    if given is not None:
        if given <= 0:
            raise UserError(f"--gpu_memory {given}: expected GiB above 0")
        return given, "as given"
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB, f"this machine's {torch.cuda.get_device_name(0)}"
    return USUAL, "assumed: no GPU here, say --gpu_memory"


class Planner:
    """Traces of one training command, each made once."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self._traces: dict[Any, Any] = {}
        config = model_config(asked)
        self.skips = config.skip_vision is not None
        self.hidden = config.hidden_size
        self.text = self._text_tokens(config)
        bits = asked.model_args.bits
        if bits != 16 and self.layout().stage == 3:
            raise UserError(f"--bits {bits} with ZeRO-3: quantised weights cannot be partitioned; use ZeRO-2")

    def _text_tokens(self, config: Any) -> int:
        from llava_sv.bench.memory_trace import image_tokens

        longest, image = self.asked.values.model_max_length, image_tokens(config)
        if self.asked.text_tokens is not None:
            if self.asked.text_tokens < 2:
                raise UserError(f"--text_tokens {self.asked.text_tokens}: expected 2 or more")
            return self.asked.text_tokens
        if longest - image < 2:
            raise UserError(
                f"--model_max_length {longest}: an image takes up to {image} tokens, which leaves no room for text; "
                "raise it, or let an image take fewer (--sv_num_retained, --sv_num_skipped)"
            )
        return longest - image

    def weights(self, stage: int | None) -> Any:
        """Precision of the weights: DeepSpeed narrows them, and keeps a float32 copy; adapters leave them frozen."""
        import torch

        values = self.asked.values
        if stage is None and not self.asked.model_args.lora_enable:
            return torch.float32
        return torch.bfloat16 if values.bf16 else torch.float16 if values.fp16 else torch.float32

    def trace(self, batch: int, stage: int | None, dense: bool, checkpointing: bool, accumulating: bool) -> Any:
        """One step at this batch."""
        from llava_sv.bench.memory_trace import Work, trace
        from llava_sv.train.build import part_of
        from llava_sv.train.lora import half

        work = Work(
            batch,
            self.text,
            weights=self.weights(stage),
            autocast=half(self.asked.values) if stage is None else None,
            checkpointing=checkpointing,
            accumulating=accumulating,
        )
        key = (work, dense, stage is None)
        if key not in self._traces:
            config = model_config(self.asked, dense=dense)
            saved: list[int] = []

            def ready(model: Any) -> Any:
                saved.append(saved_by_bits(self.asked.model_args, model))
                return prepare(self.asked, model, deepspeed=stage is not None)

            self._traces[key] = trace(config, work, ready, part_of)
            self._traces[key].weight_bytes -= saved[0]
        return self._traces[key]

    def layout(self) -> Any:
        """How the command itself spreads its states."""
        from llava_sv.bench.memory_states import layout_of

        return layout_of(self.asked.deepspeed, self.asked.world, self.hidden)

    def rows(self) -> list[Any]:
        """Layouts of the table: the command's own among them."""
        from llava_sv.bench.memory_states import layout_of, with_stage

        own = self.layout()
        base = own
        if own.stage is None:
            auto = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), "auto")
            zero = {**auto, "stage3_param_persistence_threshold": "auto", "overlap_comm": True}
            base = layout_of({"zero_optimization": zero}, self.asked.world, self.hidden)
        whole = self.asked.model_args.bits != 16  # quantised weights cannot be partitioned
        stages = [(stage, offload) for stage, offload in STAGES if not (whole and stage == 3)]
        rows = [with_stage(own if stage is None else base, stage, offload) for stage, offload in stages]
        rows = [own if row.name == own.name else row for row in rows]
        return rows if own in rows else [*rows, own]

    def estimate(self, layout: Any, batch: int, dense: bool, checkpointing: bool) -> Any:
        """Memory at this layout and batch."""
        from llava_sv.bench.memory_states import estimate

        found = self.trace(batch, layout.stage, dense, checkpointing, self.keeps(layout, batch))
        return estimate(found, layout, self.weights(layout.stage).itemsize, self.accumulation(batch) > 1)

    def keeps(self, layout: Any, batch: int) -> bool:
        """Whether whole gradients wait on the device between micro-batches."""
        return self.accumulation(batch) > 1 and (layout.stage is None or layout.stage < 2)

    def kinds(self) -> list[tuple[str, bool]]:
        """(name, whether it is dense) of the models side by side: without skipping flags there is one."""
        return [("dense", True), ("skipping", False)] if self.skips else [("dense", True)]

    def sequence(self, dense: bool) -> int:
        """Tokens of the sample that is planned for."""
        from llava_sv.bench.memory_trace import image_tokens

        return self.text + image_tokens(model_config(self.asked, dense=dense))

    @staticmethod
    def allocator() -> float:
        """The factor that is assumed for the caching allocator."""
        from llava_sv.bench.memory_states import ALLOCATOR

        return ALLOCATOR

    def global_batch(self) -> int | None:
        """Samples of an optimizer step that are asked for, or None where nothing says."""
        if self.asked.global_batch is not None:
            return self.asked.global_batch
        batch = self.asked.batch
        return None if batch is None else batch * self.asked.world * self.asked.values.gradient_accumulation_steps

    def accumulation(self, batch: int) -> int:
        """Micro-batches of a step that keep the global batch, rounded down to one at least."""
        whole = self.global_batch()
        return 1 if whole is None else max(whole // (batch * self.asked.world), 1)

    def too_small(self, own: Any, checkpointing: bool = True) -> str:
        """What to change where a batch of one is too large."""
        room, dense = self.asked.memory * GIB, not self.skips
        least = self.estimate(own, 1, dense, checkpointing).device / GIB
        fitting = [
            row.name
            for row in self.rows()
            if row.name != own.name and self.estimate(row, 1, dense, checkpointing).device <= room
        ]
        ways = [] if checkpointing else ["--gradient_checkpointing True"]
        ways += [f"{fitting[0]} (--deepspeed; scripts/zero3_offload.json)"] if fitting else []
        ways += [] if self.asked.model_args.lora_enable else ["--lora_enable True (adapters only)"]
        ways += ["more processes", "a shorter --model_max_length"]
        return (
            f"a batch of 1 does not fit: it takes {least:.1f} GiB a device with {own.name} over {self.asked.world} "
            f"process(es), and there are {self.asked.memory:.1f} ({self.asked.memory_from}); try {', or '.join(ways)}"
        )

    def suggest(self, layout: Any, checkpointing: bool) -> int:
        """The largest power of two that fits and divides the global batch; 0 where none does.

        Memory grows in proportion to the batch: two small ones say where to look, and what is found is traced.
        """
        room, whole, dense = self.asked.memory * GIB, self.global_batch(), not self.skips
        allowed = [batch for batch in POWERS if whole is None or whole % (batch * self.asked.world) == 0]

        def takes(batch: int) -> int:
            return self.estimate(layout, batch, dense, checkpointing).device

        if not allowed or takes(1) > room:
            return 0
        each = max(takes(2) - takes(1), 1)
        likely = [index for index, batch in enumerate(allowed) if takes(1) + (batch - 1) * each <= room]
        at = likely[-1]
        while at and takes(allowed[at]) > room:
            at -= 1
        while at + 1 < len(allowed) and at == likely[-1] and takes(allowed[at + 1]) <= room:
            at += 1
            likely.append(at)
        return allowed[at]


def make_plan(argv: list[str]) -> dict[str, Any]:
    """The plan as JSON: `model`, `memory`, `rows` (a layout each), `own` (the command's layout in full), `advice`.

    Raises `UserError` for flags that cannot be planned, and where even one sample does not fit.
    """
    planner = Planner(read(argv))
    asked, own = planner.asked, planner.layout()
    checkpointing = bool(getattr(asked.values, CHECKPOINTING))
    batch = asked.batch or planner.suggest(own, checkpointing) or 1
    rows = []
    for layout in planner.rows():
        row: dict[str, Any] = {"layout": layout.name, "own": layout.name == own.name}
        for kind, dense in planner.kinds():
            row[kind] = _facts(planner.estimate(layout, batch, dense, checkpointing))
        rows.append(row)
    found = planner.trace(batch, own.stage, not planner.skips, checkpointing, planner.keeps(own, batch))
    return {
        "model": {
            "parameters": {part: list(counts) for part, counts in found.parameters.items()},
            "text_tokens": planner.text,
            "sequence": {kind: planner.sequence(dense) for kind, dense in planner.kinds()},
            "lora": bool(asked.model_args.lora_enable),
        },
        "device": {"gib": round(asked.memory, 2), "from": asked.memory_from, "allocator": planner.allocator()},
        "run": {
            "world_size": asked.world,
            "batch": batch,
            "accumulation": planner.accumulation(batch),
            "global_batch": planner.global_batch(),
            "checkpointing": checkpointing,
            "layout": own.name,
        },
        "rows": rows,
        "advice": advise(planner, own, batch, checkpointing),
    }


def _facts(estimate: Any) -> dict[str, Any]:
    return {
        "device_bytes": estimate.device,
        "tensor_bytes": estimate.tensors,
        "host_bytes": estimate.host,
        "parts": estimate.parts,
        "activations": estimate.activation_parts,
        "phase": estimate.phase,
    }


def advise(planner: Planner, own: Any, batch: int, checkpointing: bool) -> dict[str, Any]:
    """Whether the command fits, and what would: batch, accumulation, checkpointing. `UserError` where one sample does
    not fit with checkpointing either, saying what to change."""
    asked = planner.asked
    takes = planner.estimate(own, batch, not planner.skips, checkpointing).device
    best = {on: planner.suggest(own, on) for on in (False, True)}
    if not best[checkpointing] and not best[True]:
        raise UserError(planner.too_small(own))
    chosen = checkpointing if best[checkpointing] else True
    if best[False] >= best[True]:
        chosen = False
    return {
        "fits": takes <= asked.memory * GIB,
        "batch": best[chosen],
        "checkpointing": chosen,
        "accumulation": planner.accumulation(best[chosen]),
        "largest": {"without checkpointing": best[False], "with checkpointing": best[True]},
    }


def plan_main(argv: list[str]) -> int:
    """`llava-sv doctor --plan ...`."""
    if {"-h", "--help"} & set(argv):
        _own_parser().parse_args(["--help"])
    if argv[:1] == ["--"]:
        return _plan_of_script(argv[1:])
    own, _ = _own_parser().parse_known_args(argv)
    plan = make_plan(argv)
    from llava_sv.train.memory_page import render

    print(render(plan))
    if own.json:
        write_json(own.json, plan)
    return 0


def _plan_of_script(command: list[str]) -> int:
    """`-- bash scripts/...`: the script says its flags itself."""
    import subprocess

    if len(command) < 2 or command[0] != "bash":
        raise UserError("after -- comes a training script: llava-sv doctor --plan -- bash scripts/v1_5/finetune.sh")
    return subprocess.run(command, env={**os.environ, "PLAN": "1", "PYTHON": sys.executable}, check=False).returncode


def main(argv: list[str] | None = None) -> int:
    """As a file, which the scripts run."""
    return exit_on_user_error(plan_main, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
