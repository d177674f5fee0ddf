"""Steps of an ablation: what makes two of them the same, marks of what is done, and failures in one line."""

from __future__ import annotations

import sys

import pytest

from llava_sv.errors import UserError
from llava_sv.eval import ablation_steps
from llava_sv.eval.ablation_steps import Marks, Step


def python_step(tmp_path, code, **rest):
    return Step("seed1/train/x", [sys.executable, "-c", code], tmp_path / "made", **rest)


def test_marks(tmp_path):
    step, marks = python_step(tmp_path, "", needs=tmp_path / "input"), Marks(tmp_path)
    assert marks.seconds(step) is None
    marks.begin(step, ["a", "1"])
    assert marks.seconds(step) is None
    step.product.write_text("")
    marks.end(step, ["a", "1"], 2.04)
    assert marks.seconds(step) == 2.0
    marks.check(step, ["a", "1"])
    with pytest.raises(UserError, match=r"begun with a 1, now a 2; set OUTPUT to another folder, or remove .*made$"):
        marks.check(step, ["a", "2"])
    (tmp_path / "input").write_text("newer")
    later = marks.path(step).stat().st_mtime + 5
    ablation_steps.os.utime(tmp_path / "input", (later, later))
    assert marks.seconds(step) is None, "its input is newer"
    marks.begin(step, ["a", "1"])
    assert not step.product.exists(), "done anew"


def test_a_changed_command_names_the_flag(tmp_path):
    step, marks = python_step(tmp_path, ""), Marks(tmp_path)
    was = ["--num_train_epochs", "2", "--lr", "4", "--report_to", "a", "b", "--BATCH", "32"]
    marks.begin(step, was)
    marks.check(step, ["--lr", "9"])
    step.product.write_text("half done")

    def refused(*now):
        with pytest.raises(UserError) as caught:
            marks.check(step, list(now))
        assert str(caught.value).endswith(f"; set OUTPUT to another folder, or remove {step.product}")
        return str(caught.value).rsplit("; set OUTPUT")[0]

    rest = ["--lr", "4", "--report_to", "a", "b", "--BATCH"]
    assert refused("--num_train_epochs", "3", *rest, "32") == "seed1/train/x: begun with --num_train_epochs 2, now 3"
    assert refused("--num_train_epochs", "2", *rest, "64") == "seed1/train/x: begun with BATCH 32, now 64"
    assert refused(*rest, "32", "--tf32") == (
        "seed1/train/x: begun with --num_train_epochs 2, now without; without --tf32, now given"
    )
    marks.begin(step, was[:-2])
    step.product.write_text("half done")
    marks.check(step, [*was[:-2], "--BATCH", "64"])  # an older mark that has no batch


def test_the_whole_batch_is_compared_not_its_parts(tmp_path, monkeypatch):
    def batch(**environment):
        chosen = {"PRESET": "tiny", "OUTPUT": "x", "ADAPTER": "a.bin", **environment}
        step = Step("seed1/train/x", ["bash", "scripts/v1_5/finetune.sh"], tmp_path / "made", chosen)
        flags = ablation_steps.paired(ablation_steps.resolve(step))
        assert "--gradient_accumulation_steps" not in flags
        return flags["--BATCH"]

    assert batch() == batch(PER_DEVICE_BATCH="8") == batch(NPROC="2", PER_DEVICE_BATCH="4") == "32"
    assert batch(BATCH="64") == "64"
    assert batch(GRAD_ACCUM="3") == "96"
    assert batch(GRAD_ACCUM="1", PER_DEVICE_BATCH="32", NPROC="2", NNODES="3", MASTER_ADDR="::1") == "192"
    hosts = tmp_path / "hosts"
    hosts.write_text("# c slots=9\na slots=2\nb slots=4\n")
    devices = {"USE_CPU": "0", "DEEPSPEED": "scripts/zero2.json", "HOSTFILE": str(hosts), "GRAD_ACCUM": "1"}
    assert batch(**devices) == "192"
    with pytest.raises(UserError, match=r"HOSTFILE=.*none: cannot be read"):
        batch(**{**devices, "HOSTFILE": str(tmp_path / "none")})


def test_a_failing_step_ends_in_one_line_with_its_log(tmp_path, capsys):
    step = python_step(tmp_path, "import sys; print('what went wrong'); sys.exit(3)")
    with pytest.raises(UserError, match=r"seed1/train/x failed \(exit code 3; whole output in .*log\)"):
        ablation_steps.execute(step, tmp_path / "log")
    assert "what went wrong" in capsys.readouterr().err


def test_what_is_removed_meanwhile_ends_in_one_line(tmp_path):
    log = tmp_path / "logs/log"
    remove = f"import shutil, sys; shutil.rmtree({str(log.parent)!r}); sys.exit("
    with pytest.raises(UserError, match=r"failed \(exit code 3; its output, .*log, was removed meanwhile\)"):
        ablation_steps.execute(python_step(tmp_path, remove + "3)"), log)
    with pytest.raises(UserError, match=r"seed1/train/x left no .*made: it was removed meanwhile; run this again"):
        ablation_steps.execute(python_step(tmp_path, remove + "0)"), log)


def test_a_missing_family_script_is_named():
    with pytest.raises(UserError, match=r"no scripts/none/finetune\.sh here: run this in the repository's root"):
        ablation_steps.resolve(Step("seed1/train/x", ["bash", "scripts/none/finetune.sh"], ablation_steps.Path("x")))
