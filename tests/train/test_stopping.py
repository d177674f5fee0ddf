"""Being asked to stop: which wish holds, what a record does to a restart, how a script's processes leave."""

import json
import os
import signal

import pytest

from llava_sv.errors import Stopped, exit_on_user_error
from llava_sv.train import stopping
from llava_sv.train.stopping import SIGNALS, Stopper


def agreed(output):
    return Stopper(output, 1, "cpu", main=True).agree()


def test_a_file_asks_without_a_signal(tmp_path):
    assert agreed(tmp_path) == ""
    (tmp_path / "stop.request").touch()
    assert agreed(tmp_path) == "stop.request"
    (tmp_path / "stop.request").write_text("SIGUSR1\n")
    assert agreed(tmp_path) == "SIGUSR1"
    (tmp_path / "stop.request").write_text("SIGINT\n")
    assert agreed(tmp_path) == "SIGINT"
    assert Stopper(tmp_path, 1, "cpu", main=False).agree() == "", "rank 0 reads it for all"


def test_signals_set_a_flag_and_ctrl_c_waits_for_a_save(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with SIGNALS:
        os.kill(os.getpid(), signal.SIGTERM)
        assert agreed(tmp_path) == "SIGTERM"
        SIGNALS.saving = True
        os.kill(os.getpid(), signal.SIGINT)
        assert agreed(tmp_path) == "SIGINT"
    with SIGNALS:
        assert agreed(tmp_path) == "", "a new run"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a second one does not disturb the way out
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stopped_run_is_not_started_again_by_torchrun(tmp_path, monkeypatch, capsys):
    stopping.stop(tmp_path, True, 75, "saved", why="SIGTERM")
    stopping.leave_again(tmp_path, main=True)  # a first start
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert exit_on_user_error(stopping.leave_again, tmp_path, True) == 75
    assert capsys.readouterr().err == "saved\n"
    stopping.clear(tmp_path)
    stopping.leave_again(tmp_path, main=True)


def test_under_the_scripts_the_record_holds_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_SV_LAUNCHED", "1")
    assert stopping.stop(tmp_path, True, 75, "saved").code == 0
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"exit_code": 75, "line": "saved"}
    blocked = tmp_path / "file"
    blocked.write_text("")
    stop = stopping.stop(blocked, True, 74, "full")
    assert isinstance(stop, Stopped)
    assert stop.code == 74, "no record could be written: the code must not be lost"
