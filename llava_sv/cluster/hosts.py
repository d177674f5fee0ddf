"""The hostfile of the DeepSpeed launcher: read, its nodes asked whether they are ready, the environment they get.

Called by `cluster.start`. Standard library only.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_sv.errors import UserError
from llava_sv.files import write_text

FORWARDED = re.compile(
    r"(NCCL|GLOO|TORCH|OMP|MKL|HF|TRANSFORMERS|TOKENIZERS|WANDB|CUDA|DS|UCX|FI|MALLOC|LLAVA_SV)_\w+"
    r"|JOIN_TIMEOUT|USE_CPU|XDG_CACHE_HOME|LD_LIBRARY_PATH|LANG|LC_ALL"
)
"""Variables of the shell that starts a run which its processes on other nodes get too."""

NOT_FORWARDED = re.compile(r".*(KEY|TOKEN|SECRET|PASSWORD).*|DS_ENV_FILE|CUDA_VISIBLE_DEVICES")
"""Of those, what stays here: secrets would stand in the nodes' process lists, and devices are counted by slots."""

ENV_FILE = "deepspeed.env"
"""In OUTPUT: the environment that was sent."""


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Host -> slots, in the file's order. Raises `UserError` with the line that is wrong."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"HOSTFILE={path}: cannot be read ({reason}); a line a node: host slots=8") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        where = f"HOSTFILE {path}, line {number}"
        match = re.fullmatch(r"([^\s=]+)\s+slots=(\d+)(?:\s*#.*)?", text)
        if match is None:
            raise UserError(f"{where}: {text!r} is not a node; expected `host slots=8` (slots: its GPUs)")
        host, slots = match[1], int(match[2])
        if slots < 1:
            raise UserError(f"{where}: {host} has slots=0; give its number of GPUs, or leave the line out")
        if host in hosts:
            raise UserError(f"{where}: {host} is named twice; one line a node, with all its slots")
        hosts[host] = slots
    if not hosts:
        raise UserError(f"HOSTFILE {path}: names no node; a line a node: host slots=8")
    return hosts


def ssh_command(host: str, port: str = "", timeout: int = 10) -> list[str]:
    """ssh that never asks, as pdsh will call it: PDSH_SSH_ARGS and PDSH_SSH_ARGS_APPEND are heeded."""
    extra = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    own = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={timeout}"]
    return ["ssh", *extra, *own, *(["-p", port] if port else []), host]


def check_nodes(hosts: dict[str, int], python: str, use_cpu: bool, port: str = "", timeout: int = 10) -> None:
    """Every node answers ssh without a password and has the repository, the interpreter and the GPUs.

    All are asked at once. timeout: seconds to connect. Raises `UserError` that names each node and what it lacks.
    """
    for program, what in (("pdsh", "the DeepSpeed launcher's pdsh"), ("ssh", "ssh")):
        if shutil.which(program) is None:
            raise UserError(
                f"HOSTFILE needs {what}, which is not installed here (apt install pdsh openssh-client); without it, "
                "start each node by NNODES, NODE_RANK and MASTER_ADDR"
            )
    repository = str(Path.cwd())
    with ThreadPoolExecutor(max_workers=min(len(hosts), 64)) as pool:
        jobs = [
            pool.submit(_ask, host, slots, repository, python, use_cpu, port, timeout) for host, slots in hosts.items()
        ]
        problems = [problem for problem in (job.result() for job in jobs) if problem]
    if problems:
        more = f"; and {len(problems) - 4} more nodes" if len(problems) > 4 else ""
        raise UserError(f"nothing was started: {'; '.join(problems[:4])}{more}")


def _ask(host: str, slots: int, repository: str, python: str, use_cpu: bool, port: str, timeout: int) -> str:
    """What is wrong with a node; empty when nothing is."""
    count = "echo gpus 0" if use_cpu else "echo gpus $(nvidia-smi -L 2>/dev/null | grep -c ^GPU)"
    script = (
        f"cd {shlex.quote(repository)} 2>/dev/null && echo repository; "
        f"command -v {shlex.quote(python)} >/dev/null && echo python; {count}"
    )
    try:
        done = subprocess.run(
            [*ssh_command(host, port, timeout), script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout + 20,
        )
    except subprocess.TimeoutExpired:
        return f"{host} does not answer ssh within {timeout + 20} s"
    said = done.stdout.split()
    if done.returncode == 255 or "gpus" not in said:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].strip()
        return f"{host} does not answer ssh without a password ({reason}); try: ssh -o BatchMode=yes {host} hostname"
    if "repository" not in said:
        return f"{host} has no folder {repository}: the repository must be at the same path on every node"
    if "python" not in said:
        return f"{host} has no {python}: the environment must be at the same path on every node"
    gpus = int(said[-1])
    if not use_cpu and 0 < gpus < slots:
        return f"{host} has {gpus} GPUs, and the hostfile says slots={slots}"
    return ""


def write_environment(output: str, extra: dict[str, str]) -> Path:
    """OUTPUT/deepspeed.env: this shell's variables for training, then those of .deepspeed_env, which win.

    DeepSpeed's launcher sends what the file holds to every node. extra: further variables.
    """
    chosen = {
        name: value
        for name, value in os.environ.items()
        if FORWARDED.fullmatch(name) and not NOT_FORWARDED.fullmatch(name) and "\n" not in value
    }
    chosen.update(extra)
    for folder in (Path.home(), Path()):
        file = folder / ".deepspeed_env"
        if not file.is_file():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, equals, value = line.partition("=")
            if not equals or not re.fullmatch(r"\s*\w+\s*", name):
                raise UserError(f"{file}, line {number}: {line.strip()!r} is not NAME=value")
            chosen[name.strip()] = value.strip()
    path = Path(output) / ENV_FILE
    write_text(path, "".join(f"{name}={value}\n" for name, value in sorted(chosen.items())))
    return path
