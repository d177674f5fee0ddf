import pytest

from llava_sv.train.train import train
from tests.distributed.runs import run_script
from tests.train.runs import losses
from tests.train.tiny import World


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Random tiny bases, sixteen records, and a projector pretrained for one step."""
    made = World(tmp_path_factory.mktemp("cluster-world"))
    output = made.folder / "pretrained"
    assert train(argv=made.flags("pretrain", output, "--max_steps", "1")) == 0
    made.projector = output / "mm_projector.bin"
    return made


@pytest.fixture(scope="session")
def one_node(world, tmp_path_factory):
    """Losses of two processes on this machine, started by torchrun, without DeepSpeed."""
    output = tmp_path_factory.mktemp("one-node") / "out"
    done = run_script(world, output, LAUNCHER="torchrun")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = losses(output)
    assert len(found) == 2
    return found
