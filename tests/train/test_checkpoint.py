"""Checkpoint folders: only complete ones count, and there is always one left."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llava_sv.errors import UserError
from llava_sv.train import checkpoint, flags, resume


def write(output, step, complete=True, size=100):
    folder = output / f"checkpoint-{step}"
    (folder / "global").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * size)
    (folder / "global" / "optimizer.pt").write_bytes(b"y" * size)
    if complete:
        checkpoint.mark_complete(folder, step, world_size=1)
    return folder


def test_the_last_is_by_number_not_by_name(tmp_path):
    for step in (900, 1000, 20):
        write(tmp_path, step)
    assert checkpoint.last_complete_checkpoint(tmp_path).name == "checkpoint-1000"
    assert checkpoint.last_complete_checkpoint(tmp_path / "none") is None


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    write(tmp_path, 10)
    unmarked = write(tmp_path, 20, complete=False)
    short = write(tmp_path, 30)
    (short / "model.safetensors").write_bytes(b"x" * 99)
    lacking = write(tmp_path, 40)
    (lacking / "global" / "optimizer.pt").unlink()
    garbled = write(tmp_path, 50)
    (garbled / checkpoint.MARKER).write_text('{"step": 5')
    assert checkpoint.last_complete_checkpoint(tmp_path).name == "checkpoint-10"
    assert "has no complete.json" in checkpoint.what_is_torn(unmarked)
    assert "model.safetensors has 99 bytes, 100 were saved" in checkpoint.what_is_torn(short)
    assert "optimizer.pt is missing" in checkpoint.what_is_torn(lacking)
    assert "cannot be read" in checkpoint.what_is_torn(garbled)
    with pytest.raises(UserError, match="not a complete checkpoint: it has no complete"):
        checkpoint.check_checkpoint(unmarked)


def test_rotation_keeps_the_newest_and_drops_torn_ones(tmp_path):
    folders = {step: write(tmp_path, step, complete=step != 20) for step in (10, 20, 30, 40)}
    checkpoint.rotate(tmp_path, 2, keep=folders[40])
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [30, 40]
    checkpoint.rotate(tmp_path, 1, keep=folders[40])
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [40]
    checkpoint.rotate(tmp_path, None, keep=folders[40])
    assert folders[40].is_dir()


def test_projector_files_hold_llavas_names_and_nothing_else(tmp_path):
    state = {
        "model.mm_projector.0.weight": torch.randn(3, 2),
        "model.mm_projector.summary.former.weight": torch.zeros(3),
        "model.layers.0.weight": torch.randn(2),
    }
    checkpoint.save_projector(tmp_path, state)
    for saved in (
        torch.load(tmp_path / "mm_projector.bin", weights_only=True),
        load_file(tmp_path / "mm_projector.safetensors"),
    ):
        assert set(saved) == {"model.mm_projector.0.weight", "model.mm_projector.summary.former.weight"}
        assert torch.equal(saved["model.mm_projector.0.weight"], state["model.mm_projector.0.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mm_projector.bin", "mm_projector.safetensors"]


def args_for(output, **changed):
    defaults = {
        "output_dir": str(output),
        "resume_from_checkpoint": None,
        "overwrite_output_dir": False,
        "should_save": True,
        "world_size": 1,
        "deepspeed": None,
    }
    return SimpleNamespace(**{**defaults, **changed})


def finished(output, **settings):
    summary = {"steps": 40, "settings": settings}
    output.mkdir(exist_ok=True)
    (output / checkpoint.SUMMARY).write_text(json.dumps(summary))


def test_plan_starts_goes_on_or_is_done(tmp_path):
    assert resume.plan(args_for(tmp_path), {}) == resume.Plan()
    write(tmp_path, 10)
    write(tmp_path, 20, complete=False)
    going_on = resume.plan(args_for(tmp_path), {})
    assert going_on.checkpoint.name == "checkpoint-10"
    assert "checkpoint-20: incomplete, ignored" in going_on.note
    finished(tmp_path, learning_rate=1e-3)
    done = resume.plan(args_for(tmp_path), {"learning_rate": 1e-3})
    assert done.finished
    assert "is finished (40 steps): nothing to do" in done.note


def test_a_finished_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    finished(tmp_path, learning_rate=1e-3, seed=1)
    with pytest.raises(UserError, match=r"other settings \(learning_rate was 0.001, now 0.002\)"):
        resume.plan(args_for(tmp_path), {"learning_rate": 2e-3, "seed": 1})


def test_a_named_checkpoint_rewinds_the_run(tmp_path):
    chosen = write(tmp_path, 10)
    later = write(tmp_path, 20)
    plan = resume.plan(args_for(tmp_path, resume_from_checkpoint=str(chosen)), {})
    assert plan.checkpoint == chosen
    assert later.is_dir()
    assert checkpoint.last_complete_checkpoint(tmp_path) == chosen, "a kill now must not resume from the later one"


def test_changed_settings_are_said_on_resumption(tmp_path):
    folder = write(tmp_path, 10)
    checkpoint.mark_complete(folder, 10, 1, {"learning_rate": 1e-3, "seed": 1})
    assert "have changed" not in resume.plan(args_for(tmp_path), {"learning_rate": 1e-3, "seed": 1}).note
    note = resume.plan(args_for(tmp_path), {"learning_rate": 2e-3, "seed": 1}).note
    assert note.endswith("note: settings have changed since: learning_rate was 0.001, now 0.002")


def test_another_batch_is_not_gone_on_with(tmp_path):
    folder = write(tmp_path, 10)
    checkpoint.mark_complete(folder, 10, 1, {"batch": 32})
    for wish in (None, str(folder)):
        with pytest.raises(
            UserError, match=r"checkpoint-10 was trained with a batch of 32 \(.*\), now 64: .*overwrite"
        ):
            resume.plan(args_for(tmp_path, resume_from_checkpoint=wish), {"batch": 64})
    assert resume.plan(args_for(tmp_path), {"batch": 32}).checkpoint == folder
    checkpoint.mark_complete(folder, 10, 1, {"seed": 1})
    assert resume.plan(args_for(tmp_path), {"batch": 64}).checkpoint == folder, "an older marker has no batch"


PLAIN = ["--output_dir", "x", "--use_cpu", "True", "--report_to", "none"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_max_length", "99"),
        ("mm_vision_select_layer", "-3"),
        ("mm_vision_select_feature", "cls_patch"),
        ("freeze_backbone", "True"),
        ("freeze_mm_mlp_adapter", "True"),
        ("image_folder", "elsewhere"),
        ("unfreeze_mm_vision_tower", "True"),
        ("mm_vision_tower_lr", "1e-6"),
        ("mm_vision_tower_lr_decay", "0.5"),
        ("weight_decay", "0.1"),
        ("warmup_steps", "7"),
        ("lr_scheduler_type", "linear"),
        ("per_device_train_batch_size", "3"),
    ],
)
def test_a_finished_run_is_not_the_one_with_another(name, value, tmp_path):
    common = [*PLAIN, "--lr_scheduler_type", "cosine"]
    was, now = (resume.settings_of(*flags.parse([*common, *more])) for more in ([], [f"--{name}", value]))
    finished(tmp_path, **was)
    assert resume.plan(args_for(tmp_path), json.loads(json.dumps(was))).finished
    key = "batch" if name.startswith("per_device") else name
    with pytest.raises(UserError, match=rf"other settings \({key} was "):
        resume.plan(args_for(tmp_path), now)
    del was[key]
    finished(tmp_path, **was)
    assert resume.plan(args_for(tmp_path), now).finished, "an older summary that lacks the name"


def test_overwriting_removes_what_would_be_taken_up(tmp_path):
    write(tmp_path, 10)
    finished(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_bytes(b"of the earlier run")
    assert resume.plan(args_for(tmp_path, overwrite_output_dir=True), {}).checkpoint is None
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("wish", "said"),
    [("True", "no complete checkpoint in"), ("no/such", "no folder no/such")],
)
def test_a_resumption_that_cannot_be_is_said(tmp_path, wish, said):
    with pytest.raises(UserError, match=said):
        resume.plan(args_for(tmp_path, resume_from_checkpoint=wish), {})


def test_false_refuses_to_mix_two_runs(tmp_path):
    write(tmp_path, 10)
    with pytest.raises(UserError, match="holds checkpoint-10"):
        resume.plan(args_for(tmp_path, resume_from_checkpoint="False"), {})


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_goes_on_whatever_the_first_start_was_told(tmp_path, monkeypatch, name):
    """torchrun's and a requeued job's: no starting over, no rewinding, what is finished stays so."""
    monkeypatch.setenv(name, "1")
    assert resume.plan(args_for(tmp_path, overwrite_output_dir=True), {}).checkpoint is None, "nothing was saved yet"
    named = write(tmp_path / "other", 15)
    wish = {"resume_from_checkpoint": str(named)}
    assert resume.plan(args_for(tmp_path, **wish), {}).checkpoint == named
    write(tmp_path, 10)
    assert resume.plan(args_for(tmp_path, **wish), {}).checkpoint == named, "of another run, before the named one"
    last = write(tmp_path, 20)
    for asked in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "False"}, wish):
        assert resume.plan(args_for(tmp_path, **asked), {}).checkpoint == last
    finished(tmp_path)
    assert resume.plan(args_for(tmp_path, overwrite_output_dir=True), {}).finished
    monkeypatch.setenv(name, "0")
    assert resume.plan(args_for(tmp_path, overwrite_output_dir=True), {}).checkpoint is None


@pytest.mark.parametrize("lost", ["weights.bin", "state.json"])
@pytest.mark.parametrize("how", ["short", "gone"])
def test_a_later_checkpoint_that_lost_something_is_passed_over(tmp_path, lost, how):
    kept = write(tmp_path, 10)
    torn = write(tmp_path, 20)
    (torn / lost).write_bytes(b"0123456789")
    checkpoint.mark_complete(torn, 20, 1)
    assert checkpoint.last_complete_checkpoint(tmp_path) == torn
    (torn / lost).write_bytes(b"012345678") if how == "short" else (torn / lost).unlink()
    assert checkpoint.last_complete_checkpoint(tmp_path) == kept
    assert "checkpoint-20: incomplete, ignored" in resume.plan(args_for(tmp_path), {}).note
