"""From the environment of a training script to the command that starts its processes, here or on many nodes.

`scripts/common.sh` calls it: `python -m llava_sv.cluster.start plan` prints how many processes there will be and then
the launcher's words, a line each; `check` looks whether what the plan needs is there (nodes, ports, GPUs). Variables:
LAUNCHER NPROC NNODES NODE_RANK MASTER_ADDR MASTER_PORT HOSTFILE NO_SSH SSH_PORT MAX_RESTARTS JOIN_TIMEOUT DEEPSPEED
USE_CPU CHECK_CLUSTER OUTPUT PYTHON. Standard library only.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llava_sv.cluster import hosts, roll_call
from llava_sv.errors import UserError, exit_on_user_error

LAUNCHERS = ("torchrun", "deepspeed", "python")
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Settings:
    """The variables, read and checked one by one."""

    launcher: str
    nproc: int
    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int | None
    hosts: dict[str, int]
    hostfile: str
    no_ssh: bool
    ssh_port: str
    max_restarts: int
    join_timeout: float
    deepspeed: bool
    use_cpu: bool
    check_cluster: str
    output: str
    python: str

    @property
    def world(self) -> int:
        """Processes of the whole run."""
        if self.hosts:
            return sum(self.hosts.values())
        if self.launcher == "python":
            return int(os.environ.get("WORLD_SIZE") or 1)
        return self.nproc * self.nnodes


def _number(env: Mapping[str, str], name: str, default: int, least: int, hint: str) -> int:
    text = env.get(name) or str(default)
    if not text.isdigit() or int(text) < least:
        raise UserError(f"{name}={text}: {hint}")
    return int(text)


def read(env: Mapping[str, str]) -> Settings:
    """Raises `UserError` for values, and for combinations, that cannot be meant."""
    nproc = _number(env, "NPROC", 8, 1, "give the processes of a node, one a GPU: 1 or more")
    nnodes = _number(env, "NNODES", 1, 1, "give the number of nodes: 1 or more")
    node_rank = _number(env, "NODE_RANK", 0, 0, f"give this node's number: 0 to {nnodes - 1}")
    port = _number(env, "MASTER_PORT", 0, 0, "give a TCP port: 1024 to 65535") or None
    if port and not 1 <= port <= 65535:
        raise UserError(f"MASTER_PORT={port}: give a TCP port: 1024 to 65535")
    hostfile, no_ssh = env.get("HOSTFILE", ""), env.get("NO_SSH", "") == "1"
    use_cpu, deepspeed = env.get("USE_CPU") == "1", bool(env.get("DEEPSPEED"))
    launcher = env.get("LAUNCHER", "")
    if launcher not in ("", *LAUNCHERS):
        raise UserError(f"LAUNCHER={launcher}: unknown; known: {', '.join(LAUNCHERS)}")
    if not launcher:
        many = nproc * nnodes > 1
        gpus_by_deepspeed = deepspeed and not use_cpu and nnodes == 1 and env.get("MAX_RESTARTS", "") in ("", "0")
        launcher = "deepspeed" if hostfile or gpus_by_deepspeed else "torchrun" if many else "python"
    settings = Settings(
        launcher, nproc, nnodes, node_rank, env.get("MASTER_ADDR", ""), port,
        hosts.read_hostfile(hostfile) if hostfile else {}, hostfile, no_ssh, env.get("SSH_PORT", ""),
        _number(env, "MAX_RESTARTS", 0, 0, "give how often a run may start again: 0 or more"),
        roll_call.join_timeout(), deepspeed, use_cpu, env.get("CHECK_CLUSTER", ""), env.get("OUTPUT", "") or ".",
        env.get("PYTHON") or "python",
    )  # fmt: skip
    _check_together(settings)
    return settings


def _check_together(run: Settings) -> None:
    if run.hosts and run.nnodes > 1:
        raise UserError(
            f"HOSTFILE={run.hostfile} with NNODES={run.nnodes}: the hostfile says which nodes there are; drop one"
        )
    if run.hosts and run.launcher != "deepspeed":
        raise UserError(
            f"LAUNCHER={run.launcher} with HOSTFILE: a hostfile is for the DeepSpeed launcher; for {run.launcher} set "
            "NNODES, NODE_RANK and MASTER_ADDR on each node"
        )
    if not run.hosts and run.nnodes > 1 and run.launcher != "torchrun":
        raise UserError(
            f"LAUNCHER={run.launcher} with NNODES={run.nnodes}: torchrun starts those; for the DeepSpeed launcher name "
            "the nodes in HOSTFILE (a line a node: host slots=8)"
        )
    if run.nnodes > 1 and not run.master_addr:
        raise UserError(f"NNODES={run.nnodes}: MASTER_ADDR is not set; give node 0's address as all nodes reach it")
    count = len(run.hosts) if run.no_ssh else run.nnodes
    if not (run.hosts and not run.no_ssh) and run.node_rank >= max(count, 1):
        raise UserError(f"NODE_RANK={run.node_rank} of {count} nodes: they are numbered 0 to {count - 1}")
    if run.no_ssh and not run.hosts:
        raise UserError("NO_SSH=1: name the nodes in HOSTFILE, and start each with its NODE_RANK")
    if run.max_restarts and run.launcher != "torchrun":
        raise UserError(f"MAX_RESTARTS={run.max_restarts}: only LAUNCHER=torchrun starts again, not {run.launcher}")
    if run.launcher == "python" and run.nproc > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"LAUNCHER=python starts one process, and NPROC={run.nproc}: set NPROC=1, LAUNCHER=torchrun, or RANK, "
            "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process that you start"
        )


def plan(run: Settings) -> list[str]:
    """The words before the training script and its flags."""
    if run.launcher == "deepspeed":
        return [*_deepspeed(run), *_entry(run, "--module")]
    if run.launcher == "torchrun":
        return [*_torchrun(run), *_entry(run, "-m")]
    return [run.python, *_entry(run, "-m")]


def _entry(run: Settings, module: str) -> list[str]:
    """With CHECK_CLUSTER, the check takes the training's place, and its command line."""
    if not run.check_cluster:
        return []
    report = ["--json", run.check_cluster] if run.check_cluster != "1" else []
    return [module, "llava_sv.cli", "doctor", "--cluster", *report, "--training"]


def _deepspeed(run: Settings) -> list[str]:
    words = ["env", "DS_ACCELERATOR=cpu"] if run.use_cpu else []
    if run.hosts and not run.no_ssh:
        words += [*([] if words else ["env"]), f"DS_ENV_FILE={Path(run.output).absolute() / hosts.ENV_FILE}"]
    words += [run.python, "-m", "deepspeed.launcher.runner", "--no_local_rank"]
    port = run.master_port or (DEFAULT_PORT if run.hosts else free_port())
    address = run.master_addr or (_first_host(run.hosts) if run.hosts else "127.0.0.1")
    words += [*(["--master_addr", address] if address else []), "--master_port", str(port)]
    if not run.hosts:
        return [*words, "--num_gpus", str(run.nproc)]
    if run.ssh_port:
        words += ["--ssh_port", run.ssh_port]
    words += ["--no_ssh", "--node_rank", str(run.node_rank)] if run.no_ssh else ["--no_ssh_check", "--force_multi"]
    return [*words, "--hostfile", run.hostfile]


def _first_host(nodes: dict[str, int]) -> str:
    """The first node's name where it resolves; else empty (an alias of ssh's: the launcher asks that node)."""
    first = next(iter(nodes))
    try:
        socket.getaddrinfo(first, None)
    except (OSError, UnicodeError):
        return ""
    return first


def _torchrun(run: Settings) -> list[str]:
    words = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"] if run.max_restarts else []
    words += [run.python, "-m", "llava_sv.cluster.torchrun"]
    port = run.master_port or DEFAULT_PORT
    if run.nnodes > 1:
        words += ["--meet", str(run.node_rank), str(run.nnodes), run.master_addr, str(port)]
        words += ["--late"] if run.max_restarts else []
    words += ["--nproc_per_node", str(run.nproc), "--nnodes", str(run.nnodes)]
    if run.max_restarts:
        words += ["--max_restarts", str(run.max_restarts)]
    if run.nnodes > 1 and run.max_restarts:
        host = "1" if run.node_rank == 0 else "0"
        words += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{run.master_addr}:{port}", "--rdzv_id", f"run-{port}"]
        words += ["--rdzv_conf", f"is_host={host},join_timeout={int(run.join_timeout)}"]
        mine = own_address(run.master_addr)
        return words + (["--local_addr", mine] if mine else [])
    if run.nnodes == 1 and run.master_port is None:
        return [*words, "--standalone"]
    return [
        *words, "--node_rank", str(run.node_rank), "--master_addr", run.master_addr or "127.0.0.1",
        "--master_port", str(port),
    ]  # fmt: skip


def own_address(towards: str) -> str:
    """This machine's address on the way to another; empty where there is no way. Nothing is sent."""
    try:
        family, where = roll_call.resolve(towards)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((where, 9))
            return probe.getsockname()[0]
    except (UserError, OSError):
        return ""


def free_port() -> int:
    """DEFAULT_PORT, or another one where that is in use."""
    for port in (DEFAULT_PORT, 0):
        try:
            with socket.create_server(("", port)) as probe:
                return probe.getsockname()[1]
        except OSError:
            continue
    return DEFAULT_PORT


def gpus_here() -> int | None:
    """GPUs that processes on this machine may use; None where it cannot be told."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else None


def check(run: Settings) -> None:
    """Look for what the plan needs, before anything starts. Raises `UserError`."""
    if run.hosts and not run.no_ssh:
        hosts.check_nodes(run.hosts, shutil.which(run.python) or run.python, run.use_cpu, run.ssh_port)
        hosts.write_environment(run.output, {"DS_ACCELERATOR": "cpu"} if run.use_cpu else {})
        return
    if run.master_addr and (run.nnodes > 1 or run.no_ssh):
        roll_call.resolve(run.master_addr)
    if not run.use_cpu:
        here = gpus_here()
        wanted = list(run.hosts.values())[run.node_rank] if run.hosts else run.nproc
        if here is not None and wanted > here:
            raise UserError(
                f"NPROC={wanted}, and this machine has {here} GPU{'' if here == 1 else 's'} to use "
                f"(nvidia-smi -L, CUDA_VISIBLE_DEVICES): set NPROC={max(here, 1)}"
            )
    if run.nnodes == 1 and not run.hosts and run.launcher == "torchrun" and run.master_port:
        try:
            socket.create_server(("", run.master_port)).close()
        except OSError as error:
            raise UserError(f"MASTER_PORT={run.master_port} is in use here: choose another, or none") from error


def main(argv: list[str]) -> None:
    """`plan`: the number of processes, then the launcher's words. `check`: exit code 2 with the reason, or 0."""
    run = read(os.environ)
    if argv == ["check"]:
        check(run)
    else:
        print(run.world, *plan(run), sep="\n")


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
