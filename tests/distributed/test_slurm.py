"""The SLURM script's body with srun and scontrol replaced by small programs that write down what they were asked."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.train.runs import ROOT

BODY = "scripts/slurm/finetune_skip.sbatch"
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$LOG"
while [[ "$1" == --* ]]; do shift; done
worst=0
for node in $(seq 0 $((NNODES - 1))); do
    SLURM_NODEID=$node SLURM_STEP_NUM_TASKS=$NNODES "$@" || { code=$?; ((code > worst)) && worst=$code; }
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$LOG"
if [[ "$1 $2" == "show hostnames" ]]; then printf 'gpu-07\\ngpu-08\\n'; fi
"""
TRAIN = """#!/usr/bin/env bash
echo "train $NODE_RANK of $NNODES x $NPROC by $LAUNCHER at $MASTER_ADDR:$MASTER_PORT: $*" >>"$LOG"
exit "${TRAIN_CODE:-0}"
"""


@pytest.fixture
def submit(tmp_path):
    """(run the body, lines that the programs wrote)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("train.sh", TRAIN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    log = tmp_path / "log"

    def run(*flags, **more):
        log.write_text("")
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": os.environ.get("HOME", "/"),
            "LOG": str(log),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "gpu-[07-08]",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "TRAIN_SCRIPT": str(programs / "train.sh"),
            **more,
        }
        # from a copy elsewhere, as SLURM does
        copy = tmp_path / "slurm_script"
        copy.write_text((ROOT / BODY).read_text())
        done = subprocess.run(
            ["bash", str(copy), *flags], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        return done, log.read_text().splitlines()

    return run


def test_one_task_a_node_with_its_number(submit):
    done, lines = submit("--learning_rate", "2e-5", "--run_name", "two words")
    assert done.returncode == 0, done.stderr
    assert lines[0] == "scontrol show hostnames gpu-[07-08]"
    assert lines[1].startswith("srun --nodes=2 --ntasks-per-node=1 ")
    where = "of 2 x 4 by torchrun at gpu-07:23456"
    assert lines[2:] == [f"train {n} {where}: --learning_rate 2e-5 --run_name two words" for n in (0, 1)]


def test_stopped_and_saved_queues_again(submit):
    done, lines = submit(TRAIN_CODE="75")
    assert done.returncode == 75
    assert lines[-1] == "scontrol requeue 123456"
    assert "queues again" in done.stdout


def test_it_does_not_queue_again_for_ever(submit):
    done, lines = submit(TRAIN_CODE="75", SLURM_RESTART_COUNT="50")
    assert done.returncode == 2
    assert "queued again 50 times already (MAX_REQUEUES)" in done.stderr
    assert not [line for line in lines if "requeue" in line]


@pytest.mark.parametrize("code", ["1", "2"])
def test_a_failure_does_not_queue_again(submit, code):
    done, lines = submit(TRAIN_CODE=code)
    assert done.returncode == int(code)
    assert not [line for line in lines if "requeue" in line]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"SLURM_JOB_ID": ""}, "error: not in a SLURM job; submit it: sbatch scripts/slurm/finetune_skip.sbatch"),
        ({"SLURM_SUBMIT_DIR": "/"}, "error: / is not the repository: submit from its root, or set LLAVA_SV_ROOT"),
        ({"TRAIN_SCRIPT": "scripts/none.sh"}, "error: TRAIN_SCRIPT=scripts/none.sh: no such script"),
    ],
)
def test_what_cannot_run_is_one_line(submit, more, said):
    done, lines = submit(**more)
    assert (done.returncode, done.stderr.strip()) == (2, said)
    assert lines == []


def test_the_real_script_plans_torchrun_from_it(submit):
    done, _ = submit(TRAIN_SCRIPT="scripts/v1_5/finetune_skip.sh", DRY_RUN="1", MASTER_ADDR="127.0.0.1")
    assert done.returncode == 0, done.stderr
    for number in ("0", "1"):
        assert f"--meet\n{number}\n2\n127.0.0.1\n23456\n--nproc_per_node\n4\n--nnodes\n2\n" in done.stdout
