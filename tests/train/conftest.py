import pytest

from tests.train import ranks
from tests.train.tiny import World


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Random tiny bases and 16 records."""
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def mixed_flags(world, tmp_path_factory):
    """A function (OUTPUT, more flags) -> flags of six skipping steps on mixed records, with a checkpoint at the third.

    The batch is 4 over all processes: two of two each, unless more flags say otherwise.
    """
    data = ranks.mixed_records(tmp_path_factory.mktemp("mixed_flags"))

    def flags(output, *more):
        return world.flags(
            *("sft", output, "--data_path", str(data), "--image_folder", str(data.parent / "images")),
            *("--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3", "--learning_rate", "5e-3"),
            *("--mm_projector_lr", "1e-2", "--weight_decay", "0.3", "--gradient_checkpointing", "True"),
            *(*ranks.FAMILIES["llava"], *more),
        )

    return flags


@pytest.fixture(scope="session")
def two_processes(mixed_flags, tmp_path_factory):
    """{ZeRO stage: OUTPUT of a run on two processes through the real entry}."""
    folder = tmp_path_factory.mktemp("two")
    for stage in (1, 2, 3):
        argv = mixed_flags(folder / str(stage), "--deepspeed", f"scripts/zero{stage}.json")
        done = ranks.launch([*ranks.TORCHRUN, "2", "llava_sv/train/train_mem.py", *argv], 240)
        assert done.returncode == 0, done.stderr[-5000:]
    return {stage: folder / str(stage) for stage in (1, 2, 3)}
