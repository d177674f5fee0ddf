"""What goes wrong while a run trains, in one place: being asked to stop, non-finite steps, a disk that is full, Ctrl-C.

`train.run` wraps its work in `guarded`; `LLaVATrainer` adds `FaultsCallback`, whose hooks run on every rank at the same
point of each step. docs/Faults.md is the user's page.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llava_sv.cluster.agree import gather, leave
from llava_sv.errors import CANNOT_WRITE, INTERRUPTED, Stopped
from llava_sv.train import checkpoint, stopping
from llava_sv.train.saving import free_space, line_of, stopped_by
from llava_sv.train.stopping import SIGNALS, Stopper, describe


class FaultsCallback(TrainerCallback):
    """See the module's head. trainer: a `LLaVATrainer` with `nonfinite` and `metrics_callback`."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        args = trainer.args
        self.stopper = Stopper(args.output_dir, args.world_size, args.device, trainer.is_world_process_zero())

    def on_train_begin(self, args, state, control, **kwargs):
        """A request that came while the model was loading: leave before the first step."""
        self.trainer.nonfinite.begin(state.global_step, state.is_world_process_zero)
        if self.stopper.agree():
            raise self._leave(state.global_step, saved=False)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Between the gradients and the optimizer."""
        self.trainer.nonfinite.before_step(self.trainer.model, state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        """Ranks agree whether to go on; a preemption saves a checkpoint and ends the loop. The last step just ends."""
        self.trainer.nonfinite.after_step()
        self.stopper.could_not_write = self.trainer.metrics_callback.failed is not None
        reason = self.stopper.agree()
        if reason in ("SIGINT", "not written"):
            raise self._leave(state.global_step, saved=False)
        if reason and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args, state, control, **kwargs):
        """The checkpoint that was asked for is complete: leave."""
        if self.stopper.reason and state.global_step < state.max_steps:
            raise self._leave(state.global_step, saved=True)

    def _leave(self, step: int, saved: bool) -> Stopped:
        """What to raise, on every rank; rank 0 leaves a record and says the line."""
        args, main = self.trainer.args, self.trainer.is_world_process_zero()
        kept = checkpoint.last_complete_checkpoint(args.output_dir)
        code, line = describe(self.stopper.reason, step, kept, saved)
        if self.stopper.reason == "not written":
            error = self.trainer.metrics_callback.failed
            where = Path(args.output_dir)
            own = line_of(where / "metrics.jsonl", error, kept, free_space(where)) if error else ""
            line = next((said for said in gather(own) if said), line)
        more = {"why": self.stopper.reason, "step": step, "checkpoint": kept and str(kept)}
        return stopping.stop(args.output_dir, main, code, line, **more)


@contextmanager
def guarded(args: Any) -> Iterator[None]:
    """A run of one rank. Ctrl-C and a full disk end it with one line; the other ranks, where they do not end by
    themselves, are ended by their launcher."""
    output, main = Path(args.output_dir), args.process_index == 0
    stopping.leave_again(output, main)
    try:
        yield
    except Stopped:
        leave(together=False)
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or SIGNALS.received == "SIGINT":
            kept = checkpoint.last_complete_checkpoint(output)
            code, line = describe("SIGINT", step_of(output), kept, saved=False)
        elif stopped_by(error):
            code, kept = CANNOT_WRITE, checkpoint.last_complete_checkpoint(output)
            line = line_of(Path(getattr(error, "filename", None) or output), error, kept, free_space(output))
        else:
            raise
        speak = main or code != INTERRUPTED
        stopped = stopping.stop(output, speak, code, line, why=stopping.REASONS[-2 if code == INTERRUPTED else -1])
        if args.world_size < 2:
            raise stopped from None
        # others may be inside a collective operation, which the interpreter's orderly end would wait for; the launcher
        # ends them where this process fails, so that the code is never 0
        if stopped.line:
            print(stopped.line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)


def step_of(output: Path) -> int:
    """The last step in metrics.jsonl."""
    from llava_sv.train.metrics import read_metrics

    rows = read_metrics(output / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0
