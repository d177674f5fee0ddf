"""All nodes, or all ranks, of a run meet for a moment before anything is built: each says its number, number 0 answers.

Numbers given twice, other sizes of the world and members that never come become one line on every member that is
there, instead of minutes of silence. `cluster.torchrun` calls it for nodes, `train.train` for ranks that no torchrun
started. Number 0 listens on MASTER_PORT, which it leaves free for torch afterwards. Standard library only.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from llava_sv.errors import UserError

VARIABLES = {"node": ("NODE_RANK", "NNODES"), "rank": ("RANK", "WORLD_SIZE")}
"""What members are called -> (variable of a member's number, variable of how many there are)."""

DEFAULT_TIMEOUT = 300
"""Seconds that members wait for one another (JOIN_TIMEOUT)."""

_HEARD = b'{"heard": true}\n'
"""Sent as soon as a member has spoken: whoever else listens on the port (torch, in a run under way) says nothing."""

_HEARD_WITHIN = 10.0
_LINGER = 5.0
_PORT_PATIENCE = 15.0
_SAY_AFTER = 10.0


@dataclass
class Member:
    """One node or rank. kind: `node` or `rank`. problem: why it cannot take part; empty when it can."""

    kind: str
    number: int
    of: int
    problem: str = ""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"{self.kind} {self.number} ({self.host}, process {self.pid})"


def join_timeout() -> float:
    """Seconds of JOIN_TIMEOUT. Raises `UserError` where it is no positive number."""
    text = os.environ.get("JOIN_TIMEOUT") or str(DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(f"JOIN_TIMEOUT={text}: give the seconds to wait for the other nodes, such as 300")
    return seconds


def resolve(address: str) -> tuple[int, str]:
    """(family, numeric address) of MASTER_ADDR. Raises `UserError` where this machine cannot resolve it."""
    try:
        family, *_, where = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"MASTER_ADDR={address} does not resolve on {socket.gethostname()} ({error}); "
            "give the name or address of node 0 as every node reaches it"
        ) from error
    return int(family), str(where[0])


def is_local(family: int, address: str) -> bool:
    """Whether this machine has that address."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def meet(me: Member, address: str, port: int, timeout: float, late: bool = False) -> None:
    """Return once all members have come. Raises `UserError` with the reason, the same on every member that is there.

    address, port: where number 0 listens. timeout: seconds. late: a run that is under way already may be joined
    (a node that is replaced).
    """
    number, count = VARIABLES[me.kind]
    if not 0 <= me.number < me.of:
        raise UserError(f"{number}={me.number} with {count}={me.of}: give each {me.kind} its own, 0 to {me.of - 1}")
    family, where = resolve(address)
    if me.number == 0:
        _Server(me, family, where, address, port, timeout).run()
    else:
        _report(me, where, address, port, timeout, late)


def _answer_of(me: Member, where: str, port: int, deadline: float) -> dict[str, Any] | None:
    """What number 0 says to `me`; None where somebody listens and does not answer. `OSError` where nobody listens."""
    with socket.create_connection((where, port), timeout=5) as link:
        link.sendall(json.dumps({"llava_sv": me.__dict__}).encode() + b"\n")
        lines = link.makefile("rb")
        try:
            link.settimeout(_HEARD_WITHIN)
            if lines.readline(1 << 16) != _HEARD:
                return None
            link.settimeout(max(deadline - time.monotonic(), 1))
            answer = json.loads(lines.readline(1 << 16))
        except (OSError, ValueError):
            return None
    return answer if isinstance(answer, dict) else None


def _report(me: Member, where: str, address: str, port: int, timeout: float, late: bool) -> None:
    start = time.monotonic()
    deadline, said, silent = start + timeout, False, False
    while time.monotonic() < deadline:
        try:
            # number 0 may have started to wait later, and gives its reason then
            answer = _answer_of(me, where, port, deadline + 2 * _LINGER)
        except OSError:
            silent = False
        else:
            silent = answer is None
            if answer is not None:
                if answer.get("problem"):
                    raise UserError(answer["problem"])
                return
            if late:
                return
        if not said and time.monotonic() - start > _SAY_AFTER:
            _say(f"{me} waits for {me.kind} 0 at {address}:{port} (JOIN_TIMEOUT={timeout:g} s)")
            said = True
        time.sleep(0.3)
    what = "something else answers there" if silent else "nothing answers there"
    raise UserError(
        f"{me} waited {timeout:g} s (JOIN_TIMEOUT) for {me.kind} 0 at {address}:{port}: {what}; see that it was "
        "started, that MASTER_ADDR and MASTER_PORT are the same everywhere, and that no firewall closes the port"
    )


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


class _Server:
    """Number 0: collects the others, and tells all of them that they may go on, or why not."""

    def __init__(self, me: Member, family: int, where: str, address: str, port: int, timeout: float) -> None:
        self.me, self.family, self.where, self.address, self.port, self.timeout = (
            me,
            family,
            where,
            address,
            port,
            timeout,
        )
        self.members = {0: me}
        self.links: list[socket.socket] = []
        self.problem = me.problem and f"{me}: {me.problem}"

    def run(self) -> None:
        listener = self._listen()
        self.stop = threading.Event()
        if not is_local(self.family, self.where):
            # the address may be a service's, or that of another machine whose number is 0 as well
            threading.Thread(target=self._look_for_another, daemon=True).start()
        try:
            self._collect(listener)
            if self.problem:
                self._linger(listener)
        finally:
            self.stop.set()
            listener.close()
            self._tell()
        if self.problem:
            raise UserError(self.problem if not self.me.problem else self.me.problem)

    def _listen(self) -> socket.socket:
        patience = time.monotonic() + min(_PORT_PATIENCE, self.timeout)
        while True:
            try:
                listener = socket.create_server(("", self.port), family=self.family, backlog=512)
                listener.settimeout(0.2)
                return listener
            except OSError as error:
                self._ask_who_is_there()
                if time.monotonic() > patience:
                    raise UserError(
                        f"MASTER_PORT={self.port} cannot be used on {self.me.host} ({error.strerror}); "
                        "choose another, the same on every node"
                    ) from error
                time.sleep(0.5)

    def _ask_who_is_there(self) -> None:
        for where in dict.fromkeys((self.where, "::1" if self.family == socket.AF_INET6 else "127.0.0.1")):
            try:
                answer = _answer_of(self.me, where, self.port, time.monotonic() + 2 * _LINGER)
            except OSError:
                continue
            if answer and answer.get("problem"):
                raise UserError(answer["problem"])

    def _look_for_another(self) -> None:
        while not self.stop.is_set():
            try:
                answer = _answer_of(self.me, self.where, self.port, time.monotonic() + 2 * _LINGER)
            except OSError:
                answer = None
            if answer:
                self.problem = self.problem or str(answer.get("problem") or "")
                return
            self.stop.wait(0.5)

    def _collect(self, listener: socket.socket) -> None:
        start, said = time.monotonic(), False
        while not self.problem and len(self.members) < self.me.of:
            self._accept(listener)
            waited = time.monotonic() - start
            if waited > self.timeout and not self.problem:
                self.problem = self._never_came()
            elif waited > _SAY_AFTER and not said:
                said = True
                _say(
                    f"{self.me} at {self.address}:{self.port} waits for {self.me.kind} {self._missing()} of "
                    f"{self.me.of} (JOIN_TIMEOUT={self.timeout:g} s)"
                )

    def _linger(self, listener: socket.socket) -> None:
        """Let those that are about to come hear the reason too."""
        end = time.monotonic() + _LINGER
        while time.monotonic() < end and len(self.members) < self.me.of:
            self._accept(listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            link, _ = listener.accept()
        except TimeoutError:
            return
        link.settimeout(5)
        try:
            said = json.loads(link.makefile("rb").readline(1 << 16))
            other = Member(**said["llava_sv"])
            link.sendall(_HEARD)
        except (OSError, ValueError, TypeError, KeyError):
            link.close()  # a port scanner, or another program
            return
        self.links.append(link)
        if other.token != self.me.token:
            self.problem = self.problem or self._objection(other)
            self.members.setdefault(other.number, other)

    def _objection(self, other: Member) -> str:
        me = self.me
        number, count = VARIABLES[me.kind]
        if other.kind != me.kind:
            return f"{me} and {other} meet at {self.address}:{self.port}: two runs; give one another MASTER_PORT"
        if other.of != me.of:
            return f"{count} is {me.of} for {me} and {other.of} for {other}: it must be the same everywhere"
        if self.members.get(other.number, other).token != other.token:
            first = self.members[other.number]
            return (
                f"{first} and {other} both have {number}={other.number}: give each {me.kind} its own, 0 to {me.of - 1}"
            )
        return f"{other}: {other.problem}" if other.problem else ""

    def _missing(self) -> str:
        gone = [str(number) for number in range(self.me.of) if number not in self.members]
        return ", ".join(gone[:8]) + (f" and {len(gone) - 8} more" if len(gone) > 8 else "")

    def _never_came(self) -> str:
        number = VARIABLES[self.me.kind][0]
        return (
            f"{self.me} waited {self.timeout:g} s (JOIN_TIMEOUT) at {self.address}:{self.port}, and {self.me.kind} "
            f"{self._missing()} of {self.me.of} never came; start it with its own {number} and the same MASTER_ADDR "
            "and MASTER_PORT"
        )

    def _tell(self) -> None:
        answer = json.dumps({"problem": self.problem}).encode() + b"\n"
        for link in self.links:
            try:
                link.sendall(answer)
                link.shutdown(socket.SHUT_WR)
                link.settimeout(2)
                link.recv(1)  # the other side closes first, so that the port is free at once
            except OSError:
                pass
            link.close()


def meet_ranks(problem: str = "") -> None:
    """Ranks whose launcher only set the environment meet; nothing to do for one process, or where torchrun did it.

    problem: why this rank cannot take part; the others then stop with it. Raises `UserError`.
    """
    environ = os.environ
    if "TORCHELASTIC_RUN_ID" in environ:
        return
    if "WORLD_SIZE" not in environ:
        _check_not_alone()
        return
    try:
        rank, world = int(environ.get("RANK", "")), int(environ["WORLD_SIZE"])
        port = int(environ.get("MASTER_PORT") or 0)
    except ValueError:
        said = " ".join(f"{name}={environ.get(name, '')}" for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        raise UserError(f"{said}: all three must be numbers; start training by bash scripts/v1_5/*.sh") from None
    if world < 2:
        return
    if not (environ.get("MASTER_ADDR") and port):
        raise UserError(f"WORLD_SIZE={world}, but MASTER_ADDR or MASTER_PORT is not set: where do the ranks meet?")
    meet(Member("rank", rank, world, problem), environ["MASTER_ADDR"], port, join_timeout())


def _check_not_alone() -> None:
    """Many processes of a job that each believe to be alone would each train the whole run."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        tasks = os.environ.get(name, "1")
        if tasks.isdigit() and int(tasks) > 1:
            raise UserError(
                f"{tasks} processes were started ({name}), and none was told its RANK and WORLD_SIZE: each would train "
                "alone; start one process a node (scripts/slurm/finetune_skip.sbatch), or set RANK, LOCAL_RANK, "
                "WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )
