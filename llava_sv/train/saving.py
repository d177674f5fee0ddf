"""Writing that fails: a full disk ends the run on all ranks with one line, and the last complete checkpoint stays.

`LLaVATrainer` saves its checkpoints, and `train.finish` the final model, through `Saving`. A rank that cannot write
goes on through the collectives of the save (others wait for it there); then all ranks compare how it went.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_sv.cluster.agree import gather
from llava_sv.errors import CANNOT_WRITE, FULL, Stopped
from llava_sv.files import write_text
from llava_sv.train import checkpoint
from llava_sv.train.stopping import SIGNALS, stop

UNFINISHED = ".saving"
"""Folder in OUTPUT where the final model is written, before its files take their places."""


def is_write_failure(error: BaseException) -> bool:
    """Whether `error` says that a file could not be written; libraries have their own types for it."""
    text = str(error)
    return isinstance(error, OSError) or any(
        said in text
        for said in ("No space left", "quota exceeded", "os error", "PytorchStreamWriter", "inline_container")
    )


def free_space(path: Path) -> str:
    """`12.3 MB` that are free where `path` lies."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return f"{shutil.disk_usage(path).free / 1e6:,.1f} MB"
    except OSError:
        return "an unknown number of MB"


def line_of(what: Path, error: BaseException, kept: Path | None, free: str) -> str:
    """What is printed: which path, how much was free, which checkpoint is whole, how to go on."""
    said = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).splitlines()[0][:200]
    there = f"{kept} is complete" if kept else "there is no complete checkpoint yet"
    go_on = "goes on from there" if kept else "starts over"
    return (
        f"error: {what} could not be written ({said}; {free} were free there); what was half-written is removed; "
        f"{there}: make room, and the same command {go_on}"
    )


class Saving:
    """How a save went, on this rank and then on all. trainer: whose checkpoints and model are written."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.error: BaseException | None = None
        self.free = ""
        self.active = False
        self._in_barriers = False

    def keep(self, error: BaseException) -> None:
        """Remember the first error, and how much space there was then."""
        if self.error is None:
            self.error, self.free = error, free_space(Path(self.trainer.args.output_dir))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """An error in here is kept for `agree` while a save is under way; outside of one it travels on."""
        try:
            yield
        except Exception as error:
            if not self.active:
                raise
            self.keep(error)

    @contextmanager
    def collected(self, what: Path) -> Iterator[None]:
        """A save of `what`: what fails in it is kept for `agree`, and Ctrl-C waits.

        DeepSpeed writes each rank's part between barriers: an error is kept where it arises, so that this rank still
        comes to them. Where one escapes all the same, the others stand in a barrier for ever: this process ends at
        once, and its launcher ends the others.
        """
        engine = self.trainer.model_wrapped if self.trainer.is_deepspeed_enabled else None
        self.active, SIGNALS.saving = True, True
        watched = self._watch(engine) if engine is not None else []
        try:
            yield
        except Exception as error:
            if self._in_barriers and self.trainer.args.world_size > 1 and is_write_failure(error):
                end_at_once(what, error)
            self.keep(error)
        finally:
            self.active, SIGNALS.saving = False, False
            for owner, name, before in watched:
                if before is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)  # an adapter run has put its own in the engine's place

    def _watch(self, engine: Any) -> list[tuple[Any, str, Any]]:
        """Keep what fails in DeepSpeed's writes, and know whether its barriers are passed; returns what to put back:
        (owner, name, what the owner itself had under it)."""
        writes = [(engine.checkpoint_engine, "save"), (engine.checkpoint_engine, "makedirs")]
        writes = [(owner, name) for owner, name in [*writes, (engine, "_copy_recovery_script")] if hasattr(owner, name)]
        before = [(owner, name, vars(owner).get(name)) for owner, name in [*writes, (engine, "save_checkpoint")]]
        for owner, name in writes:
            setattr(owner, name, self._deferring(getattr(owner, name)))
        save_checkpoint = engine.save_checkpoint

        def save_all(folder: str, *args: Any, **kwargs: Any) -> Any:
            self._in_barriers = True
            done = save_checkpoint(folder, *args, **kwargs, save_latest=False)
            self._in_barriers = False
            if engine.global_rank == 0:  # which DeepSpeed writes before its last barrier
                with self.deferred():
                    write_text(Path(folder) / "latest", f"global_step{engine.global_steps}")
            return done

        engine.save_checkpoint = save_all
        return before

    def _deferring(self, write: Any) -> Any:
        def deferring(*args: Any, **kwargs: Any) -> Any:
            with self.deferred():
                return write(*args, **kwargs)

        return deferring

    def agree(self, what: Path, remove: Path) -> None:
        """Every rank learns whether all could write; if not, `remove` goes and all raise `Stopped`."""
        args = self.trainer.args
        mine = None
        if self.error is not None:
            kept = checkpoint.last_complete_checkpoint(args.output_dir)
            kept = None if kept == remove else kept
            mine = (is_write_failure(self.error), line_of(what, self.error, kept, self.free))
        seen = gather(mine)
        failed = [one for one in seen if one is not None]
        if not failed:
            return
        if args.should_save:
            shutil.rmtree(remove, ignore_errors=True)
        if self.error is not None and not is_write_failure(self.error):
            raise self.error
        gather(None)  # the space is free before the record is written
        line = next((said for written, said in failed if written), "")
        raise stop(args.output_dir, self.trainer.is_world_process_zero(), CANNOT_WRITE, line, why="not written")


def end_at_once(what: Path, error: BaseException) -> None:
    """Say why and end this process, where others may wait for it: their launcher ends them."""
    free = free_space(what)
    shutil.rmtree(what, ignore_errors=True)
    print(line_of(what, error, checkpoint.last_complete_checkpoint(what.parent), free), file=sys.stderr, flush=True)
    os._exit(CANNOT_WRITE)


def save_final(trainer: Any) -> None:
    """The final model into OUTPUT: written beside, then moved to its place. All ranks raise `Stopped` if it fails."""
    output, saving = Path(trainer.args.output_dir), Saving(trainer)
    beside = output / UNFINISHED
    if trainer.args.should_save:
        shutil.rmtree(beside, ignore_errors=True)
    gather(None)
    trainer.saving = saving
    if trainer.metrics_callback.failed is not None:
        saving.keep(trainer.metrics_callback.failed)
    with saving.collected(beside):
        trainer.save_model(str(beside))
    saving.agree(output, beside)
    with saving.collected(beside):
        if trainer.args.should_save:
            move_into(beside, output)
    saving.agree(output, beside)


def move_into(source: Path, output: Path) -> None:
    """Each file and folder of `source` takes its place in `output`; `source` goes."""
    for entry in sorted(source.iterdir()):
        target = output / entry.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(entry, target)
    source.rmdir()


def stopped_by(error: BaseException) -> bool:
    """Whether `error` is a full disk, wherever it came up."""
    return isinstance(error, OSError) and error.errno in FULL and not isinstance(error, Stopped)
