"""Checkpoints that any number of processes and any ZeRO stage can resume: made by `llava-sv convert --universal`.

`convert` turns OUTPUT/checkpoint-N's shards into a copy by parameter, in a folder beside them; `resume` asks
`needs_universal` whether that copy is what this run must read; `take_up` has DeepSpeed read it, and `restore_groups`
puts right what DeepSpeed mixes up then.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shutil
import uuid
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from llava_sv.errors import UserError
from llava_sv.files import replacing, write_json
from llava_sv.train import checkpoint
from llava_sv.train.pickles import check_pickles, read_restricted

LATEST = "latest_universal"
"""File that names the copy's folder: DeepSpeed looks for it."""

SUFFIX = "_universal"
PARTIAL = ".partial-"
COMMAND = "llava-sv convert --universal"
ANY_STAGE = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""The file of counters and schedule, as ZeRO-1 and -2 call it, and ZeRO-3: the copy has it under both names."""

MOMENTS = ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt")


def convert(folder: str | Path, workers: int | None = None) -> Path:
    """Write the universal copy of a complete checkpoint and list it in the checkpoint's marker; returns its folder.

    All or nothing: until everything is written, the copy has another name and counts for nothing. It takes 12 bytes
    for each parameter that trains. Raises `UserError` for a folder that is not a complete DeepSpeed checkpoint.
    """
    folder = Path(folder).absolute()
    shards = _check_convertible(folder)
    if (there := universal_of(folder)) is not None:
        return there
    check_pickles(shards)
    for left_over in folder.glob(f"*{PARTIAL}*"):
        shutil.rmtree(left_over)
    final = folder / f"{shards.name}{SUFFIX}"
    (folder / LATEST).unlink(missing_ok=True)
    if final.exists():
        shutil.rmtree(final)
    partial = folder / f"{final.name}{PARTIAL}{uuid.uuid4().hex[:8]}" / final.name
    partial.mkdir(parents=True)
    try:
        _run_deepspeed(shards, partial, workers or min(4, os.cpu_count() or 1))
        _fit_for_any_stage(shards, partial)
        partial.rename(final)
    except OSError as error:
        raise UserError(f"{folder}: the universal copy cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)
    with replacing(folder / LATEST) as temporary:
        temporary.write_text(final.name, encoding="utf-8")
    marker = checkpoint.read_marker(folder)
    for file in sorted([folder / LATEST, *(path for path in final.rglob("*") if path.is_file())]):
        marker["files"][str(file.relative_to(folder))] = file.stat().st_size
    write_json(folder / checkpoint.MARKER, marker)
    return final


def _check_convertible(folder: Path) -> Path:
    """The folder with the shards of a complete checkpoint."""
    if not folder.is_dir():
        raise UserError(f"{COMMAND}: no folder {folder}; give OUTPUT/checkpoint-N")
    if (torn := checkpoint.what_is_torn(folder)) is not None:
        inside = [path.name for _, path in checkpoint.checkpoints(folder)]
        hint = f"give one of its checkpoints ({', '.join(inside)})" if inside else "choose another checkpoint"
        raise UserError(f"{COMMAND}: {folder} is not a complete checkpoint: {torn}; {hint}")
    shards = shards_of(folder)
    if shards is None:
        raise UserError(
            f"{COMMAND}: {folder} was saved without DeepSpeed: it needs no conversion, any number of processes "
            "resumes from it"
        )
    if not list(shards.glob("*_optim_states.pt")):
        raise UserError(f"{COMMAND}: {shards} has no shards of an optimizer: it was saved without ZeRO (stage 0)")
    return shards


def shards_of(folder: Path) -> Path | None:
    """DeepSpeed's own folder in a checkpoint, or None where it was saved without DeepSpeed."""
    found = [path for path in folder.glob("global_step*") if path.is_dir() and re.fullmatch(r"\w+\d", path.name)]
    return max(found, key=lambda path: int(re.sub(r"\D", "", path.name)), default=None)


def universal_of(folder: Path) -> Path | None:
    """The complete universal copy in a checkpoint, or None: it counts only once the marker lists it."""
    shards = shards_of(folder)
    if shards is None or LATEST not in checkpoint.read_marker(folder)["files"]:
        return None
    final = folder / f"{shards.name}{SUFFIX}"
    return final if final.is_dir() and checkpoint.what_is_torn(folder) is None else None


def is_zero3(shards: Path) -> bool:
    """Whether ZeRO-3 wrote these shards: it writes the weights by process too."""
    return any(shards.glob("zero_pp_rank_*_model_states.pt"))


@contextlib.contextmanager
def _silent() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


def _run_deepspeed(shards: Path, out: Path, workers: int) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # files are read and written: no device is needed
    try:
        from deepspeed.checkpoint import ds_to_universal
    except ImportError as error:
        raise UserError(f"{COMMAND} needs DeepSpeed: pip install deepspeed") from error
    args = Namespace(
        input_folder=str(shards),
        output_folder=str(out),
        num_extract_workers=workers,
        num_merge_workers=min(workers, 2),
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with _silent() as said:
        try:
            ds_to_universal.main(args)
        except OSError:
            raise
        except Exception as error:
            last = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{COMMAND}: DeepSpeed cannot convert {shards} ({last})") from error
    if not (out / "zero" / "optimizer_state.pt").is_file():
        raise UserError(f"{COMMAND}: DeepSpeed wrote no optimizer state: {said.getvalue().strip()[-200:]}")


def _fit_for_any_stage(shards: Path, out: Path) -> None:
    """Write what the other ZeRO stages look for: DeepSpeed's converter writes for the stage it came from.

    Does nothing where this DeepSpeed's ZeRO-3 reads its own form alone.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if "param" not in inspect.signature(DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state).parameters:
        return
    here = next(out / name for name in ANY_STAGE if (out / name).is_file())
    for name in ANY_STAGE:
        if not (out / name).is_file():
            shutil.copyfile(here, out / name)
    optimizer = out / "zero" / "optimizer_state.pt"
    states = read_restricted(optimizer)
    if is_zero3(shards):
        step = states["optimizer_state_dict"]["state"][0]["step"]
        for parameter in {path.parent for path in (out / "zero").rglob("fp32.pt")}:
            torch.save(step, parameter / "step.pt")
            for name in MOMENTS:
                torch.save({"param": read_restricted(parameter / name)}, parameter / name)
        states["optimizer_state_dict"]["state"] = {0: {"step": step}}  # all else of it is by parameter now
        states.pop("fp32_flat_groups", None)
        states.setdefault("ds_version", read_restricted(here)["ds_version"])
    else:
        step = read_restricted(next((out / "zero").rglob("step.pt")))
        states["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": states["param_groups"]}
    torch.save(states, optimizer)


def needs_universal(folder: Path, saved_by: int, args: Any) -> bool:
    """Whether this run must resume from the universal copy of a checkpoint: another world, or ZeRO-3 and another stage.

    saved_by: processes that wrote it. Raises `UserError` where that copy is not there, with the command that makes it,
    and where one of the two runs is without DeepSpeed.
    """
    shards = shards_of(folder)
    if not args.deepspeed:
        if shards is not None:
            raise UserError(f"{folder} was saved under DeepSpeed: resume with the same --deepspeed configuration")
        return False
    if shards is None:
        raise UserError(f"{folder} was saved without DeepSpeed: resume without --deepspeed")
    stage3 = args.deepspeed.get("zero_optimization", {}).get("stage", 0) == 3
    if saved_by == args.world_size and stage3 == is_zero3(shards):
        return False
    copy = universal_of(folder)
    if copy is None:
        what = f"by {saved_by} processes, and {args.world_size} run now"
        if saved_by == args.world_size:
            what = f"under ZeRO-{'3' if is_zero3(shards) else '1 or 2'}, and this run is under another stage"
        raise UserError(f"{folder} was saved {what}: convert it first: {COMMAND} {folder}")
    if not (copy / ANY_STAGE[stage3]).is_file():
        raise UserError(f"{copy}: the DeepSpeed that wrote it cannot change the ZeRO stage; resume under the same one")
    return True


def take_up(trainer: Any, folder: Path) -> None:
    """Have `trainer`, not yet started, resume from the universal copy in `folder`."""
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    trainer.add_callback(_RestoreGroups(trainer, folder))


class _RestoreGroups(TrainerCallback):
    """Runs once DeepSpeed has read the copy."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder

    def on_train_begin(self, args, state, control, **kwargs):
        restore_groups(self.trainer.model_wrapped.optimizer.optimizer, self.folder)


def restore_groups(optimizer: Any, folder: Path) -> None:
    """Each parameter group's own settings (learning rate, weight decay) and count of steps after a copy was read.

    DeepSpeed's ZeRO-3 gives every group the settings of the first, and all of them one tensor to count steps in, which
    each then advances. optimizer: torch's, as DeepSpeed holds it.
    """
    copy = universal_of(folder)
    if copy is None:
        raise RuntimeError(f"{folder} has no universal copy")
    saved = read_restricted(copy / "zero" / "optimizer_state.pt")["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        raise UserError(
            f"{folder} has {len(saved)} groups of parameters, this run has {len(optimizer.param_groups)}: resume with "
            "the flags it was trained with (--mm_projector_lr, --unfreeze_mm_vision_tower, ...)"
        )
    for group, was in zip(optimizer.param_groups, saved):
        group.update({name: value for name, value in was.items() if name != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
