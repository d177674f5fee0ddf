"""DeepSpeed and several processes: what must be set before Trainer sees them, and a guard that they took hold.

`arguments.TrainingArguments` calls `prepare_deepspeed`, `train.train` calls `check_world`.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from llava_sv.cluster import agree
from llava_sv.errors import UserError
from llava_sv.train import preflight
from llava_sv.train.deepspeed_config import check_against_flags, check_config, fill_in


def read_config(source: str | dict) -> dict[str, Any]:
    """A DeepSpeed configuration from a file, JSON text or a dict; `UserError` says what cannot be read."""
    if isinstance(source, dict):
        return source
    text, where = source, "--deepspeed"
    if not source.lstrip().startswith("{"):
        where = f"--deepspeed {source}"
        try:
            text = Path(source).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{where}: cannot be read ({error.strerror}); see scripts/zero1.json to zero3.json"
            ) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error


def single_process_environment() -> None:
    """What a launcher sets, for a run that was started by plain `python`."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))


def for_cpu(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with torch's Adam in place of DeepSpeed's own, which would be compiled first."""
    config = {**config, "zero_force_ds_cpu_optimizer": False}
    optimizer = config.get("optimizer")
    if optimizer and optimizer.get("type", "").lower() in ("adam", "adamw"):
        config["optimizer"] = {**optimizer, "params": {**optimizer.get("params", {}), "torch_adam": True}}
    return config


def prepare_deepspeed(flags: Any) -> dict[str, Any]:
    """Read and check the configuration, and start the process group where Trainer would start it wrongly.

    flags: the training arguments, their `deepspeed` as given (a file, JSON text or a dict). On CPU the group must be
    gloo, and there before `TrainingArguments` looks at the world; otherwise each process believes that it is alone.
    Returns the configuration as a dict.
    """
    config = read_config(flags.deepspeed)
    check_config(config, flags.own_rates())
    single_process_environment()
    check_against_flags(config, flags, int(os.environ.get("WORLD_SIZE", "1")))
    config = fill_in(config, flags)
    if not flags.use_cpu:
        return config
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ extension that compiles for a minute
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    return for_cpu(config)


def check_world(args: Any) -> None:
    """Refuse to train when the launcher's world is not the Trainer's: ranks would all train on the same data.

    An empty batch is refused too.
    """
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if (number := getattr(args, name, 1)) < 1:
            raise UserError(f"--{name}: expected 1 or more, got {number}")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    seen = args.world_size
    if launched != seen:
        raise UserError(
            f"{launched} processes were launched, and training sees {seen}: without a GPU, pass --use_cpu True"
        )
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() != seen:
        raise UserError(f"the process group has {dist.get_world_size()} members, and training sees {seen}")


def check_processes_agree(args: Any, settings: dict[str, Any]) -> None:
    """Several processes must be about to train the same: versions, code, data, base models and settings."""
    if args.world_size < 2:
        return
    files = preflight.shared_inputs({**settings, "eval_data_path": args.eval_data_path})
    adapters = settings.get("lora")
    if adapters and adapters["weight_path"]:  # may be written otherwise on each node, like the other paths
        files["model adapters"] = Path(adapters["weight_path"]).expanduser()
        settings = {**settings, "lora": {**adapters, "weight_path": "given"}}
    agree.check(files, settings)


def check_engine(model_wrapped: Any, args: Any) -> None:
    """With `--deepspeed`, the model that trains must be DeepSpeed's engine. `RuntimeError` otherwise."""
    if not args.deepspeed:
        return
    from deepspeed import DeepSpeedEngine

    if not isinstance(model_wrapped, DeepSpeedEngine):
        raise RuntimeError(f"--deepspeed was given, but training runs on {type(model_wrapped).__name__}")
