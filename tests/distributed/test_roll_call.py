"""Members that meet on one machine: all go on together, or all hear the same reason."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from llava_sv.cluster import roll_call
from llava_sv.cluster.roll_call import Member, meet, meet_ranks
from llava_sv.errors import UserError


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(roll_call, "_LINGER", 1.0)
    monkeypatch.setattr(roll_call, "_PORT_PATIENCE", 1.0)


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def all_meet(port, members, timeout=20.0):
    """What each member was told: `ok`, or the reason."""
    told = [""] * len(members)

    def one(at):
        try:
            meet(members[at], "127.0.0.1", port, timeout)
            told[at] = "ok"
        except UserError as error:
            told[at] = str(error)

    threads = [threading.Thread(target=one, args=(at,)) for at in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return told


def member(number, of=2, kind="node", host="", **more):
    return Member(kind, number, of, host=host or f"host-{number}", pid=100 + number, **more)


def test_all_go_on_and_leave_the_port_free(port):
    assert all_meet(port, [member(number, 5) for number in (3, 0, 4, 1, 2)]) == ["ok"] * 5
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (
            [member(0, 3), member(1, 3), member(1, 3, host="twin")],
            "both have NODE_RANK=1: give each node its own, 0 to 2",
        ),
        ([member(0, 2), member(1, 3)], "NNODES is 2 for node 0 (host-0, process 100) and 3 for node 1"),
        ([member(0), member(0, host="twin")], "both have NODE_RANK=0: give each node its own, 0 to 1"),
        ([member(0, kind="rank"), member(0, kind="rank", host="twin")], "both have RANK=0: give each rank its own"),
        ([member(0), member(1, kind="rank")], "two runs; give one another MASTER_PORT"),
        ([member(0), member(1, problem="no file data.json")], "node 1 (host-1, process 101): no file data.json"),
    ],
)
def test_all_hear_the_reason(port, members, said):
    told = all_meet(port, members)
    assert all(said in one for one in told), told
    assert len(set(told)) == 1


def test_a_member_that_never_comes_is_named(port):
    told = all_meet(port, [member(0, 4), member(2, 4)], timeout=1.5)
    assert "node 1, 3 of 4 never came; start it with its own NODE_RANK" in told[0]
    assert told[0] == told[1]


def test_number_0_that_never_comes(port):
    told = all_meet(port, [member(1)], timeout=1.0)[0]
    assert f"waited 1 s (JOIN_TIMEOUT) for node 0 at 127.0.0.1:{port}: nothing answers there" in told


def test_a_port_that_another_program_has(port):
    with socket.create_server(("", port)) as other:
        stop = threading.Event()

        def hang_up():
            other.settimeout(0.2)
            while not stop.is_set():
                try:
                    other.accept()[0].close()
                except TimeoutError:
                    continue

        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            assert f"MASTER_PORT={port} cannot be used" in all_meet(port, [member(0)], timeout=2)[0]
            assert "something else answers there" in all_meet(port, [member(1)], timeout=2)[0]
            meet(member(1), "127.0.0.1", port, 5, late=True)
        finally:
            stop.set()
            thread.join()


def test_a_node_that_is_replaced_joins_a_run_under_way(port, monkeypatch):
    """torch's store has the port by then, and answers nothing."""
    from torch.distributed import TCPStore

    monkeypatch.setattr(roll_call, "_HEARD_WITHIN", 0.5)
    store = TCPStore("127.0.0.1", port, 1, True)
    meet(member(1), "127.0.0.1", port, 600, late=True)
    store.set("still", "alive")
    assert store.get("still") == b"alive"


def test_who_speaks_twice_is_one_member(port):
    """Its first connection broke before it had an answer."""
    again = member(1, 3)
    late = member(2, 3)
    second = threading.Timer(0.5, lambda: meet(again, "127.0.0.1", port, 20))
    third = threading.Timer(1.5, lambda: meet(late, "127.0.0.1", port, 20))
    second.start()
    third.start()
    assert all_meet(port, [member(0, 3), again]) == ["ok"] * 2
    second.join()
    third.join()


def test_strangers_do_not_disturb(port):
    """A port scanner, a browser, another program's JSON, and one that hangs up: number 1 comes after them all."""
    answers = []

    def strangers_and_then_number_1():
        for words in (b"", b"GET / HTTP/1.0\r\n\r\n", b'{"llava_sv": {"kind": "node"}}\n', b"[1, 2]\n", b"\xff\x00\n"):
            with connected(port) as link:
                link.sendall(words)
                link.shutdown(socket.SHUT_WR)
                answers.append(link.recv(1 << 16))
        told.extend(all_meet(port, [member(1)]))

    told: list[str] = []
    thread = threading.Thread(target=strangers_and_then_number_1)
    thread.start()
    assert all_meet(port, [member(0)]) == ["ok"]
    thread.join(60)
    assert told == ["ok"]
    assert answers == [b""] * 5, "strangers are told nothing"


def connected(port):
    """A connection to whoever listens on `port`, soon."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_an_address_that_does_not_resolve():
    with pytest.raises(UserError, match=r"MASTER_ADDR=no\.such\.invalid does not resolve on "):
        meet(member(1), "no.such.invalid", 1, 1)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_PORT": "1"}, "RANK=x WORLD_SIZE=2 MASTER_PORT=1: all three must be"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, but MASTER_ADDR or MASTER_PORT is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "RANK=2 with WORLD_SIZE=2: give each rank its own, 0 to 1",
        ),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "8 processes were started (SLURM_STEP_NUM_TASKS), and none was told its RANK"),
        ({"JOIN_TIMEOUT": "soon", "WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "JOIN_TIM"),
    ],
)
def test_an_environment_that_cannot_be_meant(monkeypatch, environment, said):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        meet_ranks()
    assert said in str(error.value)


def test_two_trainings_that_are_both_rank_0_stop_at_once(port, world, tmp_path):
    """The real entry, as somebody starts it who sets the environment himself and forgets one number."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "SLURM"))},
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    command = [sys.executable, "llava_sv/train/train_mem.py", *world.flags("skip", tmp_path / "out")]
    twins = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    texts = [twin.communicate(timeout=60)[1] for twin in twins]
    assert [twin.returncode for twin in twins] == [2, 2], texts
    for text in texts:
        assert "both have RANK=0: give each rank its own, 0 to 1" in text
        assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
