"""Steps whose loss or gradient is not finite: dropped on all ranks, counted, and after too many in a row the end.

`LLaVATrainer` hands each forward's records and loss to `Nonfinite`, `faults.FaultsCallback` calls it around the
optimizer's step. A loss that is not finite makes that rank's whole gradient NaN; averaged over ranks and accumulated
batches, the gradient's norm is then not finite on any rank: they agree without asking. A dropped step leaves weights
and the optimizer's state as they were, and moves the data and the learning rate's schedule on: step k has the same
records and the same rate in every run. OUTPUT/nonfinite.jsonl has a line for each: the step, each rank's losses and
records.

Under float16, gradients that overflow are the loss scaler's affair, which drops such a step by itself and lowers its
scale; only a loss that is not finite counts there.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from llava_sv.cluster.agree import gather
from llava_sv.files import write_text
from llava_sv.train.stopping import stop

LOG = "nonfinite.jsonl"

SHOWN = 20
"""Records that the last line names; `LOG` has all."""


def read_log(path: Path, up_to: int) -> list[dict[str, Any]]:
    """The lines of a nonfinite.jsonl as far as step `up_to`; torn ones are passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= up_to:
            rows.append(row)
    return rows


def plain(value: float) -> float | str:
    """`value` as JSON has it: what is not finite becomes text."""
    return value if math.isfinite(value) else str(value)


class Nonfinite:
    """State over a run. trainer: a `LLaVATrainer`, whose `args.max_nonfinite_steps` in a row end it (0: never)."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.path = Path(trainer.args.output_dir) / LOG
        self.steps: list[int] = []
        """Steps that were dropped in this run, those before an interruption included."""
        self.grad_norm: Any = None
        self.dropped = False
        self._rows: list[dict[str, Any]] = []
        self._batches: list[tuple[list[str], torch.Tensor]] = []
        self._engine_norm: Any = None
        self._removed = 0.0
        self._removed_in_all = 0.0
        self._began = 0

    # -- one forward ------------------------------------------------------------------------------------------------

    def add(self, ids: list[str] | None) -> None:
        """The records of the batch whose loss comes next."""
        self._batches.append((list(ids or ()), torch.zeros(())))

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` as it is, or, where it is not finite, one whose gradients are NaN throughout."""
        value = loss.detach()
        if self._batches:
            self._batches[-1] = (self._batches[-1][0], value)
        factor = torch.where(torch.isfinite(value), torch.ones_like(value), torch.full_like(value, math.nan))
        return loss * factor

    # -- one optimizer step -----------------------------------------------------------------------------------------

    def before_step(self, model: Any, step: int) -> None:
        """Called between the gradients and the optimizer, on all ranks; `step` is the one that is being made.

        Raises `Stopped` on all ranks after too many in a row.
        """
        batches, self._batches, self.dropped = self._batches, [], False
        norm, self.grad_norm = self._norm(model), None
        if math.isfinite(norm):
            return
        losses = [float(loss) for _, loss in batches]
        mine = {"losses": losses, "ids": [ids for ids, _ in batches]}
        ranks = gather(mine)
        in_losses = not all(math.isfinite(loss) for rank in ranks for loss in rank["losses"])
        if self.trainer.args.fp16 and not in_losses:
            return
        self.dropped = True
        if not self.trainer.is_deepspeed_enabled and self.trainer.accelerator.scaler is None:
            for parameter in model.parameters():
                parameter.grad = None  # optimizers pass over parameters without a gradient
        removed = sum(loss for rank in ranks for loss in rank["losses"] if math.isfinite(loss)) / len(ranks)
        self._removed, self._removed_in_all = self._removed + removed, self._removed_in_all + removed
        self.steps.append(step)
        self._write(step, norm, ranks)
        self._stop_after_too_many(step)

    def after_step(self) -> None:
        """A step that DeepSpeed dropped leaves the schedule where it was: move it on, as without DeepSpeed."""
        trainer = self.trainer
        if self.dropped and not trainer.args.fp16 and trainer.accelerator.optimizer_step_was_skipped:
            trainer.lr_scheduler.step()

    def _norm(self, model: Any) -> float:
        """The gradient's norm over all ranks, as the library has measured it."""
        norm = float(self._measured(model) if self.grad_norm is None else self.grad_norm)
        if self.trainer.is_deepspeed_enabled and (norm < 0 or self.trainer.accelerator.optimizer_step_was_skipped):
            return math.inf  # DeepSpeed's own ways to say so
        return norm

    def _measured(self, model: Any) -> Any:
        if self._engine_norm is not None:
            return self._engine_norm
        parts = [p.grad.detach().float().norm() for p in model.parameters() if p.grad is not None]
        return torch.stack(parts).norm() if parts else 0.0

    def _watch_engine(self) -> None:
        """DeepSpeed without ZeRO and without float16 or bfloat16 checks nothing: do it where it makes the step."""
        engine = self.trainer.model_wrapped
        if not self.trainer.is_deepspeed_enabled or hasattr(engine.optimizer, "overflow"):
            return
        make_step = engine.optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            self._engine_norm = None
            self._engine_norm = self._measured(self.trainer.model)
            if not math.isfinite(self._engine_norm):
                for parameter in self.trainer.model.parameters():
                    parameter.grad = None
            return make_step(*args, **kwargs)

        engine.optimizer.step = step

    def _write(self, step: int, norm: float, ranks: list[dict[str, Any]]) -> None:
        """A line in `LOG`, and one on the screen."""
        if not self.trainer.is_world_process_zero():
            return
        named = {name for rank in ranks for ids in rank["ids"] for name in ids if name}
        images = self._images(named)
        row: dict[str, Any] = {"step": step, "grad_norm": plain(norm), "ranks": []}
        for number, rank in enumerate(ranks):
            batches = [
                {"loss": plain(loss), "records": [{"id": name, "images": list(images.get(name, ()))} for name in ids]}
                for ids, loss in zip(rank["ids"], rank["losses"])
            ]
            row["ranks"].append({"rank": number, "batches": batches})
        self._rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        what = "loss" if any(not isinstance(b["loss"], float) for b in self._batches_of(row)) else "gradient"
        print(
            f"step {step:,}: the {what} is not finite; the step is dropped, its records are in {self.path}", flush=True
        )

    def _images(self, ids: set[str]) -> dict[str, tuple[str, ...]]:
        dataset: Any = self.trainer.train_dataset
        samples = getattr(dataset, "dataset", dataset)  # of packs: those they are made of
        records: Any = getattr(samples, "records", None)
        return records.images_of(ids) if hasattr(records, "images_of") else {}

    @staticmethod
    def _batches_of(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [batch for rank in row["ranks"] for batch in rank["batches"]]

    def in_a_row(self, step: int) -> int:
        """How many steps up to `step`, it included, were dropped one after another."""
        count, dropped = 0, set(self.steps)
        while step - count in dropped:
            count += 1
        return count

    def _stop_after_too_many(self, step: int) -> None:
        limit = self.trainer.args.max_nonfinite_steps
        count = self.in_a_row(step)
        if not limit or count < limit:
            return
        output, main = self.trainer.args.output_dir, self.trainer.is_world_process_zero()
        line = (
            f"error: the loss or gradient of {count} steps in a row (the last is {step:,}) was not finite; "
            f"records: {self._names(count)}; look at them ({self.path} has all), lower --learning_rate, or raise "
            "--max_nonfinite_steps"
        )
        raise stop(output, main, 2, line if main else "", why="not finite", step=step)

    def _names(self, count: int) -> str:
        """Records of the last `count` dropped steps: those of the batches whose loss was not finite, if there are."""
        batches = [batch for row in self._rows[-count:] for batch in self._batches_of(row)]
        bad = [batch for batch in batches if not isinstance(batch["loss"], float)] or batches
        names: dict[str, None] = {}
        for record in (record for batch in bad for record in batch["records"]):
            names[
                f"{record['id']} ({', '.join(record['images'])})"
                if record["images"]
                else record["id"] or "one without an id"
            ] = None
        shown = list(names)[:SHOWN]
        return ", ".join(shown) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")

    # -- the run ----------------------------------------------------------------------------------------------------

    def begin(self, step: int, main: bool) -> None:
        """Go on after `step`: what was dropped before counts, later lines of `LOG` go."""
        self._watch_engine()
        self._rows = read_log(self.path, step)
        self.steps, self._began = [row["step"] for row in self._rows], step
        if main and self.path.is_file():
            write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows))

    def honest(self, loss: float, steps: int, step: int) -> float:
        """The mean loss of the last `steps` up to `step` without those that were dropped; NaN when all were."""
        dropped = sum(step - steps < one <= step for one in self.steps)
        removed, self._removed = self._removed, 0.0
        return without(loss, steps, dropped, removed)

    def honest_in_all(self, loss: float, step: int) -> float:
        """The same for the whole run since it was started or resumed."""
        dropped = sum(one > self._began for one in self.steps)
        return without(loss, step - self._began, dropped, self._removed_in_all)


def without(mean: float, steps: int, dropped: int, removed: float) -> float:
    """The mean of `steps` values, whose sum holds `removed` of `dropped` ones, over the others."""
    if not dropped:
        return mean
    return (mean * steps - removed) / (steps - dropped) if steps > dropped else math.nan
