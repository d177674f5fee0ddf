"""Being asked to stop: which wish holds, what a record does to a restart, how a script's processes leave."""

import errno
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_sv.errors import CANNOT_WRITE, Stopped, exit_on_user_error
from llava_sv.train import faults, stopping
from llava_sv.train.saving import Saving
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


def test_a_rank_that_cannot_write_fails_for_its_launcher(tmp_path, monkeypatch):
    """Others may wait for it in a collective operation: with exit code 0 the launcher would let them."""
    monkeypatch.setenv("LLAVA_SV_LAUNCHED", "1")
    monkeypatch.setattr(SIGNALS, "received", "")
    codes = []
    monkeypatch.setattr(faults.os, "_exit", codes.append)
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=1, world_size=2)
    with faults.guarded(args):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
    assert codes == [CANNOT_WRITE]


def test_what_a_save_replaces_is_put_back(tmp_path):
    """An engine's own save_checkpoint (an adapter run's, which leaves frozen weights out) stays."""

    class Engine:
        def __init__(self):
            self.checkpoint_engine, self.global_rank, self.global_steps = SimpleNamespace(save=print), 1, 1

        def save_checkpoint(self, folder, **kwargs):
            return "the class's"

    engine = Engine()
    trainer = SimpleNamespace(model_wrapped=engine, is_deepspeed_enabled=True)
    saving = Saving(trainer)
    for _ in range(2):
        with saving.collected(Path()):
            assert engine.save_checkpoint(str(tmp_path)) == "the class's"
        assert "save_checkpoint" not in vars(engine)
        assert engine.checkpoint_engine.save is print
    own = engine.save_checkpoint = lambda *_, **__: "its own"
    with saving.collected(Path()):
        assert engine.save_checkpoint(str(tmp_path)) == "its own"
    assert engine.save_checkpoint is own
