"""How commands end that the system or the user stops: one line, and an exit code that scripts can tell apart."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from llava_sv import cli, files
from llava_sv.errors import CANNOT_WRITE, FULL, INTERRUPTED, NoRoom, UserError, not_written


def ends(monkeypatch, capsys, error):
    """(exit code, stderr) of a command that ends with `error`."""

    def target(argv):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "boom", cli.Command("tests.test_errors:boom", "raise"))
    monkeypatch.setattr("tests.test_errors.boom", target, raising=False)
    return cli.main(["boom"]), capsys.readouterr().err


def system(number, *names):
    return OSError(number, os.strerror(number), *names)


DENIED, FULL_DISK, QUOTA = (os.strerror(number) for number in (errno.EACCES, errno.ENOSPC, errno.EDQUOT))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (system(errno.EACCES, "/a/b.json"), 2, f"error: /a/b.json: {DENIED}"),
        (system(errno.ENOENT, b"/a/b"), 2, "error: /a/b: No such file or directory"),
        (system(errno.ENOTEMPTY, "/a/t", None, "/a/b"), 2, "error: /a/b: Directory not empty"),
        (system(errno.ENOSPC), CANNOT_WRITE, f"error: {FULL_DISK}; make room, and run it again"),
        (system(errno.EDQUOT, "/a"), CANNOT_WRITE, f"error: /a: {QUOTA}; make room, and run it again"),
        (not_written("/a:", system(errno.ENOSPC), "x"), CANNOT_WRITE, f"error: /a: cannot be written ({FULL_DISK}); x"),
        (not_written("/a:", system(errno.EACCES), "x"), 2, f"error: /a: cannot be written ({DENIED}); x"),
        (UserError("no such file: /a"), 2, "error: no such file: /a"),
        (KeyboardInterrupt(), INTERRUPTED, "\ninterrupted"),
    ],
)
def test_one_line_and_the_exit_code(monkeypatch, capsys, error, code, said):
    assert ends(monkeypatch, capsys, error) == (code, f"{said}\n")


def test_an_error_that_is_no_system_call_s_travels_on(monkeypatch, capsys):
    with pytest.raises(OSError, match="a library says"):
        ends(monkeypatch, capsys, OSError("a library says"))
    with pytest.raises(KeyError):
        ends(monkeypatch, capsys, KeyError("a bug"))


def test_training_s_own_errors_are_left_to_it(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda command, rest: (_ for _ in ()).throw(system(errno.EACCES, "/a")))
    with pytest.raises(PermissionError):
        cli.main(["train"])


def test_no_room_comes_back_whole_from_another_process():
    error = pickle.loads(pickle.dumps(not_written("/a:", system(errno.ENOSPC), "x")))
    assert type(error) is NoRoom
    assert str(error).startswith("/a: cannot be written")


@pytest.mark.parametrize("number", [*FULL, errno.EACCES])
def test_a_write_that_fails_names_the_file_and_leaves_nothing(tmp_path, monkeypatch, number):
    target = tmp_path / "report.json"
    target.write_text("old")

    def refuse(self, *args, **kwargs):
        raise system(number) if number in FULL else system(number, str(self))

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with pytest.raises(OSError, match="report") as found:
        files.write_json(target, {})
    assert found.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert target.read_text() == "old"


def test_a_folder_that_cannot_be_written_to_is_named_by_the_file(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise system(errno.EROFS, str(tmp_path / ".report.abc.json"))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(OSError, match="Read-only") as found:
        files.write_json(tmp_path / "report.json", {})
    assert found.value.filename == str(tmp_path / "report.json")
