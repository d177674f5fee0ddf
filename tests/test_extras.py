"""Packages that a plain install leaves out: what is said where one is missing, and that nothing else is swallowed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from llava_sv import extras
from llava_sv.analysis.common import Results
from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.train import universal

LINE = 'this needs matplotlib, which a plain install leaves out: pip install "llava-sv[train]"'


@pytest.fixture
def without_matplotlib(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else real(name))


def raising(error):
    def main():
        raise error

    return main


def test_a_package_of_an_extra_is_one_line_and_exit_code_2(without_matplotlib, capsys):
    assert exit_on_user_error(raising(ModuleNotFoundError("no", name="matplotlib.pyplot"))) == 2
    assert capsys.readouterr().err == f"error: {LINE}\n"


def test_a_module_that_no_extra_brings_is_a_bug(without_matplotlib):
    for name in ("torchvision", "llava_sv.gone", None):
        with pytest.raises(ModuleNotFoundError):
            exit_on_user_error(raising(ModuleNotFoundError("no", name=name)))


def test_a_module_missing_from_an_installed_package_is_a_bug():
    with pytest.raises(ModuleNotFoundError):
        exit_on_user_error(raising(ModuleNotFoundError("no", name="pyarrow.gone")))


def test_lacking_and_require(without_matplotlib):
    assert extras.lacking("pyarrow", "matplotlib") == [LINE]
    with pytest.raises(ModuleNotFoundError, match="this needs matplotlib") as caught:
        extras.require("pyarrow", "matplotlib")
    assert (caught.value.name, str(caught.value)) == ("matplotlib", LINE)


def test_an_analysis_asks_before_it_works(without_matplotlib, tmp_path):
    with pytest.raises(ModuleNotFoundError, match="this needs matplotlib"):
        Results(str(tmp_path / "figures"), "attention")
    assert not list(tmp_path.iterdir())


def test_converting_for_another_number_of_processes_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "deepspeed.checkpoint", None)
    with pytest.raises(UserError, match=r'needs DeepSpeed: pip install "llava-sv\[train\]"$'):
        universal._run_deepspeed(tmp_path, tmp_path / "out", 1)


def test_a_clone_has_its_script_and_a_wheel_has_pip(monkeypatch):
    assert extras.how_to_get("train-gpu") == "bash scripts/setup.sh --extra train-gpu"
    assert extras.how_to_get("train") == extras.how_to_get(what="peft>=0.18") == "bash scripts/setup.sh"
    monkeypatch.setattr(extras, "SETUP", Path("/nowhere/setup.sh"))
    assert extras.how_to_get("train-gpu") == 'pip install "llava-sv[train-gpu]"'
    assert extras.how_to_get("flash") == 'pip install --no-build-isolation "llava-sv[flash]"'
    assert extras.how_to_get(what="peft>=0.18") == 'pip install "peft>=0.18"'


def test_flags_of_training_need_no_reader_of_tables():
    """`convert` takes the flags that say what skips: a plain install converts."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('pyarrow', 'datasets', 'deepspeed', 'matplotlib'))); "
        "from llava_sv.release.convert import main; main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "--sv_num_retained" in done.stdout
