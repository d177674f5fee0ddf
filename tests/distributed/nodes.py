"""Two machines in one: each node has its own network, hostname, processes, /dev/shm and mounts, joined by a cable.

Nothing outlives a node: its namespaces belong to one process, which ends when this one closes its input or dies.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.train.runs import ROOT

ADDRESS = {"a": "10.111.7.1", "b": "10.111.7.2"}
HOSTS = "127.0.0.1 localhost\n" + "".join(f"{address} node-{name}\n" for name, address in ADDRESS.items())
KEPT = ("PATH", "HOME", "LANG", "TMPDIR")
"""Variables that a node, or a script on this machine, is given of ours."""


def why_not() -> str:
    """Why nodes cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    for program in ("unshare", "nsenter", "ip", "mount", "hostname"):
        if shutil.which(program) is None:
            return f"needs {program}"
    # the cable too: some kernels have namespaces and no veth
    probe = (
        "ip link add probe0 type veth peer name probe1 && mount -t tmpfs tmpfs /dev/shm && hostname probe && "
        "ip link set lo up"
    )
    made = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", probe]
    done = subprocess.run(made, capture_output=True, text=True, timeout=30)
    return "" if done.returncode == 0 else f"namespaces are forbidden here ({done.stderr.strip() or done.returncode})"


def why_no_ssh() -> str:
    """Why a node cannot run sshd and pdsh; empty where it can."""
    missing = [program for program in ("ssh", "ssh-keygen", "pdsh") if shutil.which(program) is None]
    if not Path("/usr/sbin/sshd").exists():
        missing.append("sshd")
    return f"needs {', '.join(missing)}" if missing else ""


class Node:
    """One node. Its first process waits for the end of its input; with it everything in the node ends."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, ADDRESS[name], folder
        hosts = folder / "hosts"
        hosts.write_text(HOSTS)
        setup = (
            f"hostname node-{name} && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && mkdir /run/sshd && "
            f"mount --bind {hosts} /etc/hosts && ip link set lo up && echo ready && exec cat >/dev/null"
        )
        apart = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.first = subprocess.Popen(
            [*apart, "sh", "-c", setup], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.first.stdout
        assert self.first.stdout.readline() == "ready\n", f"node {name} was not made"
        children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
        self.pid = int(children[0])

    def start(self, command: list[str], **environment: str) -> subprocess.Popen:
        """Start a command in the node; output of both kinds together."""
        clean = {name: os.environ[name] for name in KEPT if name in os.environ}
        clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
        return subprocess.Popen(
            ["nsenter", "-t", str(self.pid), "--net", "--uts", "--mount", "--pid", "--wd=" + str(ROOT), *command],
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str) -> str:
        """Run a short command that must succeed."""
        process = self.start(list(command))
        text = process.communicate(timeout=60)[0]
        assert process.returncode == 0, f"{command}: {text}"
        return text

    def close(self) -> None:
        self.first.kill()
        self.first.communicate()


@contextlib.contextmanager
def two_nodes(folder: Path):
    """Nodes a and b on one cable; gone on leaving, whatever happened."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for name in ADDRESS:
            home = folder / name
            home.mkdir()
            node = Node(name, home)
            stack.callback(node.close)
            nodes.append(node)
        a, b = nodes
        a.run("ip", "link", "add", "cable", "type", "veth", "peer", "name", "far")
        # moved by process number, so no name is ever shared with the machine's own network
        a_sees_b = ["nsenter", "-t", str(a.pid), "--net", "ip", "link", "set", "far", "netns", str(b.pid)]
        subprocess.run(a_sees_b, check=True, timeout=30)
        for node, link in ((a, "cable"), (b, "far")):
            node.run("ip", "addr", "add", f"{node.address}/24", "dev", link)
            node.run("ip", "link", "set", link, "up")
        yield a, b


@contextlib.contextmanager
def ssh_between(nodes, folder: Path):
    """sshd in each node with a key made here. Yields the folder to put first in PATH: its `ssh` knows the key."""
    key, config, programs = folder / "key", folder / "ssh_config", folder / "bin"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=30)
    shutil.copy(f"{key}.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"HostKey {key}\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\n"
    )
    config.write_text(
        f"Host *\n  IdentityFile {key}\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    programs.mkdir()
    ssh = programs / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
    ssh.chmod(0o755)
    servers = [node.start(["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]) for node in nodes]
    try:
        for node in nodes:
            _wait_for_port(node)
        yield programs
    finally:
        for server in servers:
            server.kill()  # of nsenter alone: sshd ends with its node, and its end of the pipe stays open until then
            server.stdout.close()
            server.wait()


def _wait_for_port(node) -> None:
    for _ in range(100):
        if ":22 " in node.run("sh", "-c", "ss -ltn 2>/dev/null || cat /proc/net/tcp | sed 's/:0016 /:22 /'"):
            return
        time.sleep(0.1)
    raise AssertionError(f"no sshd in node {node.name}")
