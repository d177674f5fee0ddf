"""scripts/adaptive.sh: the pair of rows that it hands to the ablation, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(*words, **variables):
    kept = {name: value for name, value in os.environ.items() if name not in ("BUDGET", "SELECTION", "OUTPUT", "DATA")}
    env = {**kept, "PYTHON": sys.executable, **variables}
    command = ["bash", "scripts/adaptive.sh", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)


def test_both_rows_share_everything_but_who_decides(tmp_path):
    done = script(DRY_RUN="1", OUTPUT=str(tmp_path), SEEDS="3", BUDGET="6+8", SELECTION="cls_attention")
    assert done.returncode == 0, done.stderr
    fixed, auto = (line for line in done.stdout.splitlines() if "finetune_skip.sh" in line)
    assert "--sv_num_retained 6 " in fixed
    assert "--sv_num_retained auto --sv_retained_mean 6 " in auto
    for line in (fixed, auto):
        assert "--sv_num_skipped 8 --sv_selection cls_attention" in line
        assert "SEED=3" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("budget", ["16", "16+", "0+4", "a+b"])
def test_a_budget_that_cannot_be_read_is_one_line(budget):
    done = script(BUDGET=budget)
    assert done.returncode == 2
    assert done.stderr == f"adaptive: BUDGET={budget}: write retained + skipped tokens, such as 16+20\n"


def test_help_is_the_head_of_the_script():
    done = script("--help")
    assert done.returncode == 0
    assert "BUDGET=6+8 EPOCHS=1 bash scripts/adaptive.sh" in done.stdout
