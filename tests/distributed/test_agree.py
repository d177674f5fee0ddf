"""What ranks compare: the lines that name a difference, and how files are told apart."""

from __future__ import annotations

import hashlib
import json

import pytest

from llava_sv import cluster_doctor
from llava_sv.cluster import agree
from llava_sv.errors import UserError


def row(rank, host, gpu_id=None, **facts):
    return {"rank": rank, "local_rank": 0, "host": host, "pid": 100 + rank, "gpu_id": gpu_id, "facts": facts}


def test_versions_and_settings_name_ranks_and_both_values():
    rows = [row(0, "a", torch="2.13", **{"settings learning_rate": "1e-05"}) for _ in range(1)]
    rows += [row(1, "a", torch="2.13", **{"settings learning_rate": "1e-05"})]
    rows += [row(2, "b", torch="2.11", **{"settings learning_rate": "2e-05"})]
    assert agree.differences(rows) == [
        "torch differs: 2.13 on ranks 0, 1 (a); 2.11 on rank 2 (b); install one version of torch on every node",
        "learning_rate differs: 1e-05 on ranks 0, 1 (a); 2e-05 on rank 2 (b); start every node with the same flags",
    ]
    assert agree.differences(rows[:2]) == []


def test_one_rank_or_one_gpu_given_twice():
    assert agree.same_number([row(0, "a", "gpu-x"), row(1, "a", "gpu-y")]) == []
    said = agree.same_number([row(0, "a", "gpu-x"), row(0, "b", "gpu-x")])
    assert said[0] == "process 100 (a) and process 100 (b) both have RANK 0; give each its own"
    assert "both have GPU gpu-x" in said[1]


def test_a_file_is_told_by_its_content_and_not_by_its_place(tmp_path):
    one, two, other = (tmp_path / name for name in ("one.json", "two.json", "other.json"))
    one.write_text("[1]")
    two.write_text("[1]")
    other.write_text("[2]")
    expected = hashlib.sha256(b"3" + b"[1]").hexdigest()[:12]
    assert agree.describe(one) == agree.describe(two) == f"3 bytes, sha256 {expected}"
    assert agree.describe(other) != agree.describe(one)
    assert agree.describe(tmp_path / "absent") == agree.describe(None) == "missing"


def test_a_large_file_is_read_in_part_or_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(agree, "_WHOLE", 1 << 10)
    monkeypatch.setattr(agree, "_BLOCK", 16)
    monkeypatch.setattr(agree, "_BLOCKS", 4)
    files = {name: tmp_path / name for name in ("plain", "end", "between")}
    content = bytearray(4096)
    for name, at in (("plain", None), ("end", 4095), ("between", 100)):
        changed = bytearray(content)
        if at is not None:
            changed[at] = 1
        files[name].write_bytes(bytes(changed))
    assert agree.digest_of(files["end"]) != agree.digest_of(files["plain"])
    assert agree.digest_of(files["between"]) == agree.digest_of(files["plain"]), "between the blocks"
    assert agree.digest_of(files["between"], whole=True) != agree.digest_of(files["plain"], whole=True)


def test_where_a_path_is_written_may_differ():
    found = agree.facts({}, {"data_path": "/x/data.json", "seed": 1})
    assert found["settings seed"] == "1"
    assert "settings data_path" not in found


def test_the_check_stops_with_the_first_three(monkeypatch):
    rows = [row(rank, f"h{rank}", a=str(rank), b=str(rank), c=str(rank), d=str(rank)) for rank in (0, 1)]
    monkeypatch.setattr(agree, "gather", lambda mine: rows)
    with pytest.raises(
        UserError, match=r"^nothing was trained: a differs.* \| b differs.* \(and 1 more; CHECK_CLUSTER"
    ):
        agree.check({}, {})


def test_clocks_apart_are_one_line_a_node():
    rows = [row(rank, host) for rank, host in enumerate(["a", "a", "b", "b", "c"])]
    for one, offset in zip(rows, (0.0, 0.1, -61.2, -61.2, 7.0)):
        one["clock_offset_seconds"] = offset
    assert cluster_doctor._clock_problems(rows, 5.0) == [
        "the clock of b (rank 2) is 61.2 s behind that of a (rank 0), more than 5 s; set both by NTP",
        "the clock of c (rank 4) is 7.0 s ahead of that of a (rank 0), more than 5 s; set both by NTP",
    ]
    assert cluster_doctor._clock_problems(rows, 100.0) == []


def test_one_process_agrees_with_itself(tmp_path, world, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    report = tmp_path / "report.json"
    training = ["train_mem.py", *world.flags("skip", tmp_path / "out")]
    assert cluster_doctor.main(["--cluster", "--json", str(report), "--training", *training]) == 0
    page, facts = capsys.readouterr().out, json.loads(report.read_text())
    assert facts["ok"] is True
    assert facts["world"] == 1
    assert facts["all_reduce"] is None
    assert not (tmp_path / "out").exists()
    sum_ = facts["ranks"][0]["facts"]["data"].rpartition(" ")[2]
    assert sum_ in page
    assert "All processes agree." in page


def test_what_is_missing_is_said_with_its_rank(tmp_path, world, capsys):
    training = ["train_mem.py", *world.flags("skip", tmp_path / "out", "--data_path", "/nonexistent.json")]
    assert cluster_doctor.main(["--cluster", "--training", *training]) == 2
    assert "no file /nonexistent.json" in capsys.readouterr().err
