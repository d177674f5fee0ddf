"""Two nodes, as far as one machine can be two: the launchers reach both, and both train the same or not at all."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.distributed.nodes import ADDRESS, ssh_between, two_nodes, why_no_ssh, why_not
from tests.distributed.runs import FLAGS, SCRIPT, settings
from tests.train.runs import losses

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
with_ssh = pytest.mark.skipif(bool(why_no_ssh()), reason=why_no_ssh())

PORT = 29500
"""Free in a network of their own."""


@pytest.fixture
def nodes(tmp_path):
    with two_nodes(tmp_path) as pair:
        yield pair


def on_both(nodes, world, output, *flags, ranks=("0", "1"), more=({}, {}), **common):
    """(exit code, output) of the script started on each node by hand, torchrun between them."""
    processes = []
    for node, rank, own in zip(nodes, ranks, more):
        variables = settings(world, output, NPROC="1", NNODES="2", NODE_RANK=rank, MASTER_ADDR=ADDRESS["a"], **common)
        processes.append(node.start(["bash", SCRIPT, *FLAGS, *flags], **{**variables, "MASTER_PORT": str(PORT), **own}))
    return [end_of(process) for process in processes]


def end_of(process):
    """(exit code, output); of one that hangs, what it has said so far: the other node's words tell why."""
    try:
        text = process.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired as late:
        process.kill()  # of nsenter alone: what runs in the node ends with it
        process.stdout.close()
        text = f"it hung: {late.output!r}"
    return process.wait(), text


def test_torchrun_with_zero3_trains_as_one_node_does(nodes, world, one_node, tmp_path):
    done = on_both(nodes, world, tmp_path / "out", DEEPSPEED="scripts/zero3.json")
    assert [code for code, _ in done] == [0, 0], done
    assert losses(tmp_path / "out") == pytest.approx(one_node, rel=1e-4)
    summary = json.loads((tmp_path / "out" / "train_summary.json").read_text())
    assert summary["world_size"] == 2
    assert "done: 2 steps" in done[0][1]


def test_the_same_number_twice_stops_both_before_anything_starts(nodes, world, tmp_path):
    """NODE_RANK forgotten on the second node."""
    done = on_both(nodes, world, tmp_path / "out", ranks=("0", "0"))
    assert [code for code, _ in done] == [2, 2], done
    for _, text in done:
        assert "both have NODE_RANK=0: give each node its own, 0 to 1" in text
        assert "node-a" in text
        assert "node-b" in text
        assert "Traceback" not in text
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_other_data_on_one_node_is_never_trained_on(nodes, world, tmp_path):
    data = tmp_path / "sft.json"
    records = json.loads((world.data / "sft.json").read_text())
    data.write_text(json.dumps(records))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(records[:-1]))
    nodes[1].run("mount", "--bind", str(other), str(data))
    done = on_both(nodes, world, tmp_path / "out", DATA=str(data))
    assert [code for code, _ in done] == [2, 2], done
    told = [text for _, text in done if "nothing was trained: data differs" in text]
    assert told, done
    for text in told:
        assert f"{data.stat().st_size:,} bytes" in text
        assert f"{other.stat().st_size:,} bytes" in text
        assert "rank 0 (node-a)" in text
        assert "rank 1 (node-b)" in text
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_the_check_names_what_differs_between_nodes(nodes, world, tmp_path):
    """OUTPUT is a folder of each node's own."""
    output = tmp_path / "out"
    output.mkdir()
    nodes[1].run("mount", "-t", "tmpfs", "tmpfs", str(output))
    report = tmp_path / "report.json"
    done = on_both(nodes, world, output, CHECK_CLUSTER=str(report))
    assert [code for code, _ in done] == [2, 2], done
    page = done[0][1]
    assert "2 processes on 2 nodes" in page
    assert f"--output_dir {output} is not shared: what rank 0 (node-a) writes there is not seen by rank 1" in page
    facts = json.loads(report.read_text())
    assert [row["host"] for row in facts["ranks"]] == ["node-a", "node-b"]
    assert [row["sees_output"] for row in facts["ranks"]] == [True, False]
    assert facts["all_reduce"]["gb_per_s"] > 0
    assert len(facts["problems"]) == 1
    assert not any(output.iterdir()), "the check leaves nothing behind"


@pytest.fixture
def ssh(nodes, tmp_path):
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    with ssh_between(nodes, folder) as programs:
        yield {"PATH": f"{programs}:{os.environ['PATH']}"}


def hostfile(folder, *names):
    path = folder / "hostfile"
    path.write_text("# the nodes of the test\n" + "".join(f"{name} slots=1\n" for name in names))
    return str(path)


@with_ssh
def test_deepspeed_over_a_hostfile_trains_as_one_node_does(nodes, ssh, world, one_node, tmp_path):
    output = tmp_path / "out"
    variables = settings(world, output, HOSTFILE=hostfile(tmp_path, "node-a", "node-b"), DEEPSPEED="scripts/zero2.json")
    process = nodes[0].start(["bash", SCRIPT, *FLAGS], **variables, **ssh, HF_HUB_OFFLINE="1", HF_TOKEN="a-secret")
    text = process.communicate(timeout=280)[0]
    assert process.returncode == 0, text[-4000:]
    assert losses(output) == pytest.approx(one_node, rel=1e-5)
    assert json.loads((output / "train_summary.json").read_text())["world_size"] == 2
    for name in ("node-a: ", "node-b: "):
        assert name in text, "pdsh names the node of each line"
    sent = (output / "deepspeed.env").read_text().splitlines()
    assert "HF_HUB_OFFLINE=1" in sent
    assert "OMP_NUM_THREADS=1" in sent
    assert not [line for line in sent if "a-secret" in line], "secrets are not sent"


@with_ssh
def test_a_node_that_does_not_answer_is_named(nodes, ssh, world, tmp_path):
    """node-c is nowhere, and nothing listens on node b's other port."""
    for hosts, more, gone in (
        (("node-a", "node-c"), {}, "node-c does not answer ssh"),
        (("node-a", "node-b"), {"SSH_PORT": "2222"}, "node-b does not answer ssh"),
    ):
        variables = settings(world, tmp_path / "out", HOSTFILE=hostfile(tmp_path, *hosts), **more)
        process = nodes[0].start(["bash", SCRIPT, *FLAGS], **variables, **ssh)
        text = process.communicate(timeout=120)[0]
        assert process.returncode == 2, text
        assert "error: nothing was started: " in text
        assert gone in text
        assert "Traceback" not in text


@pytest.mark.slow
def test_deepspeed_without_ssh_each_node_by_hand(nodes, world, one_node, tmp_path):
    names = hostfile(tmp_path, "node-a", "node-b")
    processes = [
        node.start(
            ["bash", SCRIPT, *FLAGS],
            **settings(world, tmp_path / "out", HOSTFILE=names, NO_SSH="1", NODE_RANK=str(rank), DEEPSPEED=""),
        )
        for rank, node in enumerate(nodes)
    ]
    texts = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert losses(tmp_path / "out") == pytest.approx(one_node, rel=1e-5)


@pytest.mark.slow
def test_torchrun_that_may_restart_meets_by_c10d(nodes, world, one_node, tmp_path):
    done = on_both(nodes, world, tmp_path / "out", MAX_RESTARTS="1")
    assert [code for code, _ in done] == [0, 0], done
    assert losses(tmp_path / "out") == pytest.approx(one_node, rel=1e-5)
