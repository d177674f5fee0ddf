"""How a process of several ends: exit code, tracebacks, atexit functions, output; a library in it would abort."""

import subprocess
import sys

import pytest

from tests.train.runs import environment

PROGRAM = """
import atexit, ctypes, sys, threading, time
sys.argv[0] = "llava-sv"  # a program of the package's own: it imports no torch
from concurrent.futures import ThreadPoolExecutor
from llava_sv.errors import Stopped, UserError, exit_on_user_error
from llava_sv.cluster import ending

ending.PATIENCE = {patience}  # seconds: without need, nobody waits so long
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)  # the orderly end of this process is an abort
atexit.register(lambda: print("atexit ran"))
{before}
def main():
    {main}

sys.exit(ending.in_order(lambda: exit_on_user_error(main)))
"""
FOREVER = "threading.Thread(target=threading.Event().wait).start()"
POOL = "pool = ThreadPoolExecutor(1); pool.submit(lambda: (time.sleep(0.3), print('written')))"


def program(main, before="", world="2", patience=600):
    source = PROGRAM.format(main=main, before=before, patience=patience)
    # stdout is a pipe: what is not flushed is lost
    return subprocess.run(
        [sys.executable, "-c", source], env=environment(WORLD_SIZE=world), capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        ("print('done')", 0, ""),
        ("raise UserError('no such file')", 2, "error: no such file\n"),
        ("raise Stopped(74, 'the disk is full')", 74, "the disk is full\n"),
        ("raise Stopped(75)", 75, ""),
        ("raise Stopped(130, 'interrupted')", 130, "interrupted\n"),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('a text')", 1, "a text\n"),
        ("sys.exit()", 0, ""),
    ],
)
def test_the_exit_code_stays(main, code, said):
    done = program(main)
    assert (done.returncode, done.stderr) == (code, said)
    assert done.stdout.splitlines()[-1] == "atexit ran"


@pytest.mark.parametrize(("kind", "code"), [("ZeroDivisionError", 1), ("KeyboardInterrupt", 130)])
def test_a_traceback_stays(kind, code):
    done = program(f"raise {kind}")
    assert done.returncode == code
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.rstrip().endswith(kind)


def test_what_it_guards_against():
    """The same program in a process that is alone ends as Python ends it: in the abort."""
    assert program("print('done')", world="1").returncode == -6


@pytest.mark.parametrize("before", [FOREVER, f"{FOREVER}; sys.stdout.write('unfinished')"])
def test_a_thread_that_never_ends(before):
    done = program("raise Stopped(75)", before, patience=1)
    assert done.returncode == 75
    assert "atexit ran" in done.stdout


def test_work_under_way_is_finished_first():
    done = program("print('done')", POOL)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["done", "written", "atexit ran"])


def test_work_that_outlasts_patience_is_finished_where_the_run_is_done():
    """A checkpoint on its way to slow storage, say; a run that failed does not wait, so that it can be restarted."""
    slow = POOL.replace("sleep(0.3)", "sleep(1.5)")
    done = program("print('done')", slow, patience=0.2)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["done", "written", "atexit ran"])
    assert done.stderr.startswith("note: done; waiting for work under way (ThreadPoolExecutor-0_0")
    assert program("raise Stopped(74, 'the disk is full')", slow, patience=0.2).stdout.splitlines() == ["atexit ran"]


def test_an_atexit_function_that_fails():
    done = program("raise Stopped(75)", "atexit.register(lambda: 1 / 0)")
    assert done.returncode == 75
    assert "ZeroDivisionError" in done.stderr
    assert "atexit ran" in done.stdout


def test_who_watches_exits_hears_the_code():
    """As trackers do, which mark a run as failed by it."""
    watch = "real = sys.exit; sys.exit = lambda code=0: (print('heard', code), real(code))"
    done = program("raise Stopped(75)", watch)
    assert done.returncode == 75
    assert done.stdout.splitlines() == ["heard 75", "atexit ran"]


def test_nobody_reads_the_output():
    command = f'{sys.executable} -c "$PROGRAM" | true; exit ${{PIPESTATUS[0]}}'
    source = PROGRAM.format(main="time.sleep(0.5); print('done')", before="", patience=600)
    done = subprocess.run(
        ["bash", "-c", command], env=environment(WORLD_SIZE="2", PROGRAM=source), capture_output=True, timeout=60
    )
    assert done.returncode == 1  # as `exit_on_user_error` has it
