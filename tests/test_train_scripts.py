"""The recipe's scripts: valid bash, known flags, defaults that are checked all at once, and the tiny preset."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llava_sv.train.flags import parse

ROOT = Path(__file__).parent.parent
FOLDERS = ("v1_5", "v1_5_hd", "cos")
SCRIPTS = sorted(
    f"{folder}/{path.name}"
    for folder in FOLDERS
    for path in (ROOT / "scripts" / folder).glob("*.sh")
    if path.name != "tiny.sh"
)
FAMILY = {"v1_5": "llava", "v1_5_hd": "llava_hd", "cos": "cos"}


def run(script, *flags, **environment):
    clean = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG")}
    clean |= {"HF_HUB_CACHE": "/nonexistent/hub", **environment}
    return subprocess.run(
        ["bash", f"scripts/{script if '/' in script else 'v1_5/' + script}", *flags],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=60,
    )


def flags_of(script, *extra, **environment):
    """(launcher words, training flags) that the script would run."""
    done = run(script, *extra, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    entry = words.index("llava_sv/train/train_mem.py")
    return words[:entry], words[entry + 1 :]


def on_cpu(flags):
    """The same flags where they can be parsed without a GPU or DeepSpeed."""
    flags = list(flags)
    for name in ("--bf16", "--tf32", "--deepspeed"):
        if name in flags:
            at = flags.index(name)
            del flags[at : at + 2]
    return [*flags, "--use_cpu", "True"]


def test_the_scripts_are_there():
    every = [f"{folder}/{name}.sh" for folder in FOLDERS for name in ("finetune", "finetune_skip", "pretrain")]
    assert sorted([*every, "v1_5/finetune_skip_256.sh", "v1_5/finetune_skip_lora.sh"]) == SCRIPTS


@pytest.mark.parametrize("script", [*SCRIPTS, "v1_5/tiny.sh", "common.sh"])
def test_bash_can_read_it(script):
    assert subprocess.run(["bash", "-n", f"scripts/{script}"], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("preset", ["", "tiny"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_known(script, preset):
    _, flags = flags_of(script, PRESET=preset)
    model, _, training = parse(on_cpu(flags))
    assert model.mm_family == FAMILY[script.split("/")[0]]
    assert model.tune_mm_mlp_adapter is script.endswith("pretrain.sh")
    assert model.unfreeze_mm_vision_tower is (script.startswith("cos/finetune"))
    assert (model.skip_vision() is not None) is ("skip" in script)
    assert training.gradient_checkpointing is (preset == "")


@pytest.mark.parametrize(
    ("script", "batch", "lr", "zero"),
    [
        (script, *((256, 1e-3, "scripts/zero2.json") if "pretrain" in script else (128, 1e-5, "scripts/zero3.json")))
        for script in SCRIPTS
        if not script.endswith("_lora.sh")
    ],
)
def test_the_papers_recipe(script, batch, lr, zero):
    launcher, flags = flags_of(script)
    _, _, training = parse(on_cpu(flags))
    assert launcher[-2:] == ["--num_gpus", "8"]
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == batch
    assert training.learning_rate == lr
    assert (training.warmup_steps, training.lr_scheduler_type, training.weight_decay) == (0.03, "cosine", 0.0)
    assert training.num_train_epochs == 1
    assert training.model_max_length == (3500 if script == "v1_5_hd/finetune.sh" else 2048)
    assert flags[flags.index("--deepspeed") + 1] == zero
    assert flags[flags.index("--model_name_or_path") + 1] == "meta-llama/Meta-Llama-3-8B-Instruct"
    tower = "openai/clip-vit-large-patch14" + ("" if script.startswith("cos/") else "-336")
    assert flags[flags.index("--vision_tower") + 1] == tower


def test_what_cos_asks_for():
    model = parse(on_cpu(flags_of("cos/pretrain.sh")[1]))[0]
    assert model.family_settings() == {"mm_projector_type": "cos_80"}
    model = parse(on_cpu(flags_of("cos/finetune.sh")[1]))[0]
    assert model.family_settings() == {"mm_projector_type": "cos_1296", "mm_vision_image_size": 448}


def test_cos_336_has_its_own_budget():
    model = parse(on_cpu(flags_of("cos/finetune_skip.sh", PROJECTOR="cos_336")[1]))[0]
    assert model.skip_vision() == {"merge": True}, "the family fills in Nr and Ns"
    model = parse(on_cpu(flags_of("cos/finetune_skip.sh", PROJECTOR="cos_336", NUM_SKIPPED="32")[1]))[0]
    assert model.skip_vision() == {"merge": True, "num_skipped": 32}


@pytest.mark.parametrize("script", ["pretrain", "finetune", "finetune_skip"])
def test_anyres_takes_no_number_of_tiles(script):
    assert "--hd_max_tiles" in flags_of(f"v1_5_hd/{script}.sh")[1]
    assert "--hd_max_tiles" not in flags_of(f"v1_5_hd/{script}.sh", ASPECT_RATIO="anyres")[1]


@pytest.mark.parametrize(
    ("script", "retained", "skipped"), [("v1_5_hd/finetune_skip.sh", 576, 576), ("cos/finetune_skip.sh", 272, 256)]
)
def test_what_the_other_families_skip(script, retained, skipped):
    block = parse(on_cpu(flags_of(script)[1]))[0].skip_vision()
    assert (block["num_retained"], block["num_skipped"], block["merge"]) == (retained, skipped, True)


def test_what_the_skipping_scripts_skip():
    model = parse(on_cpu(flags_of("finetune_skip.sh")[1]))[0]
    block = model.skip_vision()
    assert (block["num_retained"], block["num_skipped"], block["merge"]) == (100, 156, True)
    model = parse(on_cpu(flags_of("finetune_skip_256.sh")[1]))[0]
    block = model.skip_vision()
    assert (block["num_retained"], block["merge"]) == (256, False)


def test_llavas_lora_recipe():
    _, flags = flags_of("finetune_skip_lora.sh")
    model, _, training = parse(on_cpu(flags))
    assert model.lora_settings() == {
        **{"r": 128, "alpha": 256, "dropout": 0.05, "bias": "none", "target_modules": [], "weight_path": None}
    }
    assert (training.learning_rate, training.mm_projector_lr) == (2e-4, 2e-5)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == 128
    assert flags[flags.index("--deepspeed") + 1] == "scripts/zero3.json"
    block = model.skip_vision()
    assert (block["num_retained"], block["num_skipped"]) == (100, 156)


def test_qlora_by_one_variable_and_going_on_from_adapters():
    _, flags = flags_of("finetune_skip_lora.sh", BITS="4")
    assert parse(on_cpu(flags))[0].lora_settings()["bits"] == 4
    assert flags[flags.index("--deepspeed") + 1] == "scripts/zero2.json"
    assert flags[flags.index("--output_dir") + 1].endswith("-qlora-4")
    _, flags = flags_of("finetune_skip_lora.sh", LORA_WEIGHTS="checkpoints/a")
    assert "--pretrain_mm_mlp_adapter" not in flags
    assert parse(on_cpu(flags))[0].lora_weight_path == "checkpoints/a"


def test_fewer_devices_accumulate_to_the_same_batch():
    _, flags = flags_of("finetune.sh", NPROC="2", PER_DEVICE_BATCH="4")
    assert flags[flags.index("--gradient_accumulation_steps") + 1] == "16"
    done = run("finetune.sh", NPROC="3", DRY_RUN="1")
    assert done.returncode == 2
    assert "BATCH=128 is no multiple of PER_DEVICE_BATCH=16 x 3 processes" in done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"PRESET": "tiny", "NPROC": "64"}, "PER_DEVICE_BATCH=0: each of 64 processes needs one sample or more"),
        ({"PER_DEVICE_BATCH": "many"}, "PER_DEVICE_BATCH=many: each of 8 processes"),
        ({"BATCH": "1o"}, "BATCH=1o: give a whole number of samples"),
        ({"PRESET": "tiny", "BATCH": "0"}, "BATCH=0: give a whole number of samples"),
    ],
)
def test_a_batch_that_is_none_is_refused(changes, said):
    done = run("finetune.sh", DRY_RUN="1", **changes)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")


def test_the_tiny_batch_is_shared_between_processes():
    for processes, each in (("1", "32"), ("2", "16")):
        _, flags = flags_of("finetune_skip.sh", PRESET="tiny", NPROC=processes)
        assert parse(flags)[2].per_device_train_batch_size == int(each)


def test_further_flags_are_passed_on_and_win():
    _, flags = flags_of("finetune.sh", "--learning_rate", "3e-5", "--max_steps", "7", LR="2e-5")
    training = parse(on_cpu(flags))[2]
    assert (training.learning_rate, training.max_steps) == (3e-5, 7)


def test_launchers(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=4\nlocalhost slots=4\n")
    launcher, flags = flags_of("finetune.sh", HOSTFILE=str(hosts), OUTPUT="out", PER_DEVICE_BATCH="4")
    assert launcher[-2:] == ["--hostfile", str(hosts)]
    assert launcher[:2] == ["env", f"DS_ENV_FILE={ROOT}/out/deepspeed.env"]
    assert launcher[launcher.index("--master_addr") + 1] == "127.0.0.1"
    assert flags[flags.index("--gradient_accumulation_steps") + 1] == "4", "128 = 4 x 8 slots x 4"
    launcher, _ = flags_of("finetune.sh", USE_CPU="1", NPROC="2", DEEPSPEED="")
    assert launcher[1:5] == ["-m", "llava_sv.cluster.torchrun", "--nproc_per_node", "2"]
    launcher, _ = flags_of("finetune.sh", PRESET="tiny")
    assert len(launcher) == 1
    launcher, _ = flags_of("finetune.sh", NNODES="2", NPROC="4", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    assert launcher[1:8] == ["-m", "llava_sv.cluster.torchrun", "--meet", "1", "2", "10.0.0.1", "29500"]
    assert launcher[-6:] == ["--node_rank", "1", "--master_addr", "10.0.0.1", "--master_port", "29500"]
    launcher, _ = flags_of("finetune.sh", LAUNCHER="torchrun", MAX_RESTARTS="2")
    assert launcher[:2] == ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    assert launcher[-3:] == ["--max_restarts", "2", "--standalone"]
    launcher, _ = flags_of("finetune.sh", CHECK_CLUSTER="report.json")
    assert launcher[-7:] == ["--module", "llava_sv.cli", "doctor", "--cluster", "--json", "report.json", "--training"]


HOSTS = "node-a slots=8\nnode-b slots=8\n"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun: unknown; known: torchrun, deepspeed, python"),
        ({"NPROC": "0"}, "NPROC=0: give the processes of a node, one a GPU: 1 or more"),
        ({"NPROC": "two"}, "NPROC=two: give the processes of a node"),
        ({"NNODES": "2"}, "NNODES=2: MASTER_ADDR is not set; give node 0's address"),
        ({"NNODES": "2", "MASTER_ADDR": "h", "NODE_RANK": "2"}, "NODE_RANK=2 of 2 nodes: they are numbered 0 to 1"),
        ({"NNODES": "2", "MASTER_ADDR": "h", "LAUNCHER": "deepspeed"}, "torchrun starts those"),
        ({"HOSTFILE": HOSTS, "NNODES": "2"}, "the hostfile says which nodes there are; drop one"),
        ({"HOSTFILE": HOSTS, "LAUNCHER": "torchrun"}, "a hostfile is for the DeepSpeed launcher"),
        ({"HOSTFILE": "# none\nnode-a: 8\n"}, "line 2: 'node-a: 8' is not a node; expected `host slots=8`"),
        ({"HOSTFILE": "node-a slots=8\nnode-a slots=8\n"}, "line 2: node-a is named twice"),
        ({"HOSTFILE": "node-a slots=0\n"}, "line 1: node-a has slots=0"),
        ({"HOSTFILE": "\n# nobody\n"}, "names no node"),
        ({"HOSTFILE": "/nonexistent"}, "HOSTFILE=/nonexistent: cannot be read (No such file or directory)"),
        ({"NO_SSH": "1"}, "NO_SSH=1: name the nodes in HOSTFILE"),
        ({"MAX_RESTARTS": "1", "LAUNCHER": "deepspeed"}, "only LAUNCHER=torchrun starts again, not deepspeed"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1: give how often"),
        ({"LAUNCHER": "python"}, "LAUNCHER=python starts one process, and NPROC=8"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: give a TCP port"),
        ({"JOIN_TIMEOUT": "soon"}, "JOIN_TIMEOUT=soon: give the seconds"),
    ],
)
def test_a_launch_that_cannot_be_meant_is_one_line(variables, said, tmp_path):
    hosts = variables.get("HOSTFILE", "")
    if "\n" in hosts:
        (tmp_path / "hosts").write_text(hosts)
        variables = {**variables, "HOSTFILE": str(tmp_path / "hosts")}
    done = run("finetune.sh", DRY_RUN="1", **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""


def start_check(tmp_path, **variables):
    """`check` of a launch, with an nvidia-smi that lists two GPUs."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'GPU 0: A (UUID: x)\\nGPU 1: A (UUID: y)\\n'\n")
    smi.chmod(0o755)
    clean = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "OUTPUT": str(tmp_path), **variables}
    return subprocess.run(
        [sys.executable, "-m", "llava_sv.cluster.start", "check"],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_more_processes_than_gpus(tmp_path):
    assert start_check(tmp_path, NPROC="2").returncode == 0
    done = start_check(tmp_path, NPROC="3")
    assert done.returncode == 2
    assert (
        "NPROC=3, and this machine has 2 GPUs to use (nvidia-smi -L, CUDA_VISIBLE_DEVICES): set NPROC=2" in done.stderr
    )
    done = start_check(tmp_path, NPROC="2", CUDA_VISIBLE_DEVICES="1")
    assert "this machine has 1 GPU to use" in done.stderr
    assert start_check(tmp_path, NPROC="8", USE_CPU="1").returncode == 0


def test_a_master_that_does_not_resolve_or_a_port_in_use(tmp_path):
    done = start_check(tmp_path, USE_CPU="1", NNODES="2", NODE_RANK="1", MASTER_ADDR="no.such.invalid")
    assert done.returncode == 2
    assert "MASTER_ADDR=no.such.invalid does not resolve on " in done.stderr
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        done = start_check(tmp_path, USE_CPU="1", NPROC="2", MASTER_PORT=port)
    assert (done.returncode, f"MASTER_PORT={port} is in use here" in done.stderr) == (2, True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_defaults_are_said_all_at_once(script):
    done = run(script, USE_CPU="1")
    assert done.returncode == 2
    assert "nothing was started" in done.stderr
    for what in ("language model (LLM", "vision tower (VISION_TOWER", "training data (DATA"):
        assert what in done.stderr
    if not script.endswith("pretrain.sh"):
        assert "pretrained projector (ADAPTER" in done.stderr
        assert f"made by: bash scripts/{script.split('/')[0]}/pretrain.sh" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_preset():
    done = run("finetune.sh", PRESET="huge")
    assert (done.returncode, done.stderr.strip()) == (2, "error: PRESET=huge: unknown preset; known: tiny")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_page_and_the_environment(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"PRESET=tiny bash scripts/{script}" in done.stdout
    assert "PER_DEVICE_BATCH" in done.stdout


@pytest.mark.parametrize("name", ["zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"])
def test_deepspeed_configurations(name):
    config = json.loads((ROOT / "scripts" / name).read_text())
    assert config["train_micro_batch_size_per_gpu"] == "auto"
    assert config["zero_optimization"]["stage"] == int(name[len("zero")])
    assert "optimizer" not in config, "one there would take --mm_projector_lr away"
    if name.startswith("zero3"):
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize("script", [name for name in SCRIPTS if not name.endswith("pretrain.sh")])
@pytest.mark.parametrize("preset", ["", "tiny"])
def test_a_whole_llava_brings_its_encoder_and_projector(script, preset):
    """VISION_TOWER and ADAPTER that are given and empty leave their flags out, and nothing else."""
    room = {"PRESET": preset, "LLM": "checkpoints/my model", "USE_CPU": "1"}
    _, usual = flags_of(script, **room)
    _, flags = flags_of(script, **room, VISION_TOWER="", ADAPTER="")
    for name in ("--vision_tower", "--pretrain_mm_mlp_adapter"):
        at = usual.index(name)
        assert usual[at + 1]
        del usual[at : at + 2]
    assert flags == usual
    assert flags[flags.index("--model_name_or_path") + 1] == "checkpoints/my model"
