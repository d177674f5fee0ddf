"""A DeepSpeed checkpoint resumed by another number of processes, or under another ZeRO stage; and what stops it."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from llava_sv import cli
from llava_sv.errors import UserError
from llava_sv.train import checkpoint, resume, universal
from tests.train import ranks
from tests.train.runs import losses

TOLERANCE = 1e-6
"""Relative, in float32: one process adds in another order than two."""

ALONE = ("--per_device_train_batch_size", "4")


def interrupted(whole, output):
    """A run that was stopped after its third step."""
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoint-6")
    (output / "train_summary.json").unlink()
    return output / "checkpoint-3"


def go_on(pairs, two_processes, mixed_flags, folder):
    """(folder, what each run saw): runs of two processes went on in one, and runs of one went on in two.

    pairs: (ZeRO stage of the interrupted run, that of the one which goes on).
    """

    def job(name, stage, *more):
        return {"name": name, "argv": mixed_flags(folder / name, "--deepspeed", f"scripts/zero{stage}.json", *more)}

    def converted(whole, name):
        assert cli.main(["convert", "--universal", str(interrupted(whole, folder / name))]) == 0

    in_one, in_two = [job(f"one-{stage}", stage, *ALONE) for stage in (2, 3)], []
    for was, now in pairs:
        converted(two_processes[was], f"two-{was}-one-{now}")
        in_one.append(job(f"two-{was}-one-{now}", now, *ALONE))
    seen = ranks.run_jobs(folder / "one", in_one, ranks=1)
    for was, now in pairs:
        converted(folder / f"one-{was}", f"one-{was}-two-{now}")
        in_two.append(job(f"one-{was}-two-{now}", now))
    return folder, seen | ranks.run_jobs(folder / "two", in_two)


@pytest.fixture(scope="module")
def to_another_stage(two_processes, mixed_flags, tmp_path_factory):
    return go_on([(2, 3), (3, 2)], two_processes, mixed_flags, tmp_path_factory.mktemp("another"))


@pytest.fixture(scope="module")
def to_the_same_stage(two_processes, mixed_flags, tmp_path_factory):
    return go_on([(2, 2), (3, 3)], two_processes, mixed_flags, tmp_path_factory.mktemp("same"))


def assert_undisturbed(gone_on, two_processes, name):
    folder, seen = gone_on
    assert losses(folder / name) == pytest.approx(losses(two_processes[2]), rel=TOLERANCE)
    (whole,) = seen["one-2"]
    for step in range(3):
        rows = [row for rank in seen[name] for row in rank["seen"][step]["rows"]]
        assert sorted(rows) == sorted(whole["seen"][step + 3]["rows"]), "the samples that were still to come"


@pytest.mark.parametrize("name", ["two-2-one-3", "two-3-one-2", "one-2-two-3", "one-3-two-2"])
def test_other_processes_and_another_stage_go_on(to_another_stage, two_processes, name):
    assert_undisturbed(to_another_stage, two_processes, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two-2-one-2", "two-3-one-3", "one-2-two-2", "one-3-two-3"])
def test_other_processes_go_on_under_the_same_stage(to_the_same_stage, two_processes, name):
    assert_undisturbed(to_the_same_stage, two_processes, name)


def saved(folder, world_size=2, zero3=False):
    """A folder that looks like a DeepSpeed checkpoint of step 3."""
    shards = folder / "global_step3"
    shards.mkdir(parents=True)
    for name in ["zero_pp_rank_0_mp_rank_00_optim_states.pt", *(["zero_pp_rank_0_mp_rank_00_model_states.pt"] * zero3)]:
        (shards / name).write_bytes(b"x")
    checkpoint.mark_complete(folder, 3, world_size, {"batch": 4})
    return folder


def args_for(stage, world_size):
    return SimpleNamespace(deepspeed={"zero_optimization": {"stage": stage}}, world_size=world_size)


@pytest.mark.parametrize(
    ("zero3", "stage", "world_size", "said"),
    [
        (False, 2, 1, "was saved by 2 processes, and 1 run now: convert it first: llava-sv convert --universal {}$"),
        (True, 2, 2, "was saved under ZeRO-3, and this run is under another stage: convert it first: llava-sv convert"),
        (False, 3, 2, "was saved under ZeRO-1 or 2, and this run is under another stage: convert it first"),
    ],
)
def test_what_must_be_converted_first_is_said(tmp_path, zero3, stage, world_size, said):
    folder = saved(tmp_path / "checkpoint-3", zero3=zero3)
    with pytest.raises(UserError, match=said.format(folder)):
        resume._go_on(args_for(stage, world_size), folder, {"batch": 4})


def test_the_same_world_and_stage_need_no_copy(tmp_path):
    folder = saved(tmp_path / "checkpoint-3")
    assert not resume._go_on(args_for(1, 2), folder, {"batch": 4}).from_universal


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path):
    folder = saved(tmp_path / "checkpoint-3")
    with pytest.raises(UserError, match="saved under DeepSpeed: resume with the same --deepspeed"):
        universal.needs_universal(folder, 2, SimpleNamespace(deepspeed=None, world_size=2))
    shutil.rmtree(folder / "global_step3")
    with pytest.raises(UserError, match="saved without DeepSpeed: resume without --deepspeed"):
        universal.needs_universal(folder, 2, args_for(2, 2))


@pytest.mark.parametrize("when", ["_fit_for_any_stage", "write_json"])
def test_a_killed_conversion_counts_for_nothing(two_processes, tmp_path, monkeypatch, when):
    """Stopped before the copy has its name, and before the marker lists it: the checkpoint is as it was."""
    folder = interrupted(two_processes[2], tmp_path / "run")
    marker = checkpoint.read_marker(folder)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(universal, when, killed)
        with pytest.raises(KeyboardInterrupt):
            universal.convert(folder)
    (folder / f"global_step3_universal{universal.PARTIAL}dead").mkdir()
    assert universal.universal_of(folder) is None
    assert checkpoint.what_is_torn(folder) is None
    assert checkpoint.read_marker(folder) == marker
    copy = universal.convert(folder)
    assert universal.universal_of(folder) == copy
    assert not list(folder.glob(f"*{universal.PARTIAL}*"))
    listed = checkpoint.read_marker(folder)["files"]
    assert {file.relative_to(folder).as_posix() for file in copy.rglob("*.pt")} < listed.keys()
    assert universal.convert(folder) == copy, "what is there is not made again"
    next(copy.rglob("exp_avg.pt")).unlink()
    assert universal.universal_of(folder) is None


def test_groups_get_their_own_settings_and_counters_back(two_processes, tmp_path):
    """As DeepSpeed's ZeRO-3 leaves them: all like the first, and all counting in one tensor."""
    folder = interrupted(two_processes[3], tmp_path / "run")
    universal.convert(folder)
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 1.0, "weight_decay": 0.3} for weight in weights])
    step = torch.tensor(3.0)
    for weight in weights:
        optimizer.state[weight] = {"step": step}
    universal.restore_groups(optimizer, folder)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, 0.3, 0.0]
    assert len({group["lr"] for group in optimizer.param_groups}) == 2, "the projector has a rate of its own"
    assert len({id(state["step"]) for state in optimizer.state.values()}) == 4
    optimizer.param_groups.pop()
    with pytest.raises(UserError, match="has 4 groups of parameters, this run has 3: resume with the flags"):
        universal.restore_groups(optimizer, folder)


def test_what_cannot_be_converted_is_one_line(tmp_path, capsys):
    run = tmp_path / "run"
    folder = saved(run / "checkpoint-3")
    plain = run / "checkpoint-2"
    plain.mkdir()
    checkpoint.mark_complete(plain, 2, 1)
    empty = saved(tmp_path / "empty")
    torch.save({}, next(empty.rglob("*.pt")))
    checkpoint.mark_complete(empty, 3, 2, {"batch": 4})
    for given, said in (
        (tmp_path / "none", "no folder"),
        (run, "is not a complete checkpoint: it has no complete.json: saving was interrupted; give one of its "
         "checkpoints (checkpoint-2, checkpoint-3)"),
        (plain, "was saved without DeepSpeed: it needs no conversion"),
        (folder, "zero_pp_rank_0_mp_rank_00_optim_states.pt: cannot be read"),
        (empty, "DeepSpeed cannot convert"),
    ):  # fmt: skip
        assert cli.main(["convert", "--universal", str(given)]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert said in error[0]
    assert sorted(path.name for path in folder.iterdir()) == ["complete.json", "global_step3"]
    assert cli.main(["convert"]) == 2
    assert "one of the arguments --universal --merge-lora is required" in capsys.readouterr().err


def test_the_marker_keeps_what_others_wrote(two_processes, tmp_path):
    folder = interrupted(two_processes[2], tmp_path / "run")
    marker = checkpoint.read_marker(folder) | {"another": 1}
    (folder / checkpoint.MARKER).write_text(json.dumps(marker))
    universal.convert(folder)
    after = checkpoint.read_marker(folder)
    assert {name: after[name] for name in after if name != "files"} == {k: v for k, v in marker.items() if k != "files"}
    assert marker["files"].items() < after["files"].items()
