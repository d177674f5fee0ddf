"""`llava-sv doctor`: versions against pyproject's ranges, and what is said to be missing."""

from __future__ import annotations

import importlib.metadata
import json

from llava_sv import doctor

NO_GPU = {"cuda_build": None, "driver_present": False, "devices": []}
ONE_GPU = {
    "cuda_build": "13.0",
    "driver_present": True,
    "devices": [{"name": "X", "memory_gib": 80.0, "free_gib": 79.0, "capability": "9.0", "bf16": True}],
}


def test_versions_are_those_installed_and_extras_are_not_required():
    rows = {row["name"]: row for row in doctor.required_packages()}
    assert rows["torch"]["version"] == importlib.metadata.version("torch")
    assert rows["torch"]["ok"]
    assert "flash-attn" not in rows
    assert "pytest" not in rows


def test_too_old_and_absent_packages_are_missing(monkeypatch):
    versions = {"torch": "2.5.0", "deepspeed": None}
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: versions[name] if name in versions else real(name))
    rows = {row["name"]: row for row in doctor.required_packages()}
    assert not rows["torch"]["ok"]
    assert not rows["deepspeed"]["ok"]
    missing = {item["what"]: item for item in doctor.find_missing(list(rows.values()), {}, NO_GPU)}
    assert missing["torch>=2.11"]["why"] == "found 2.5.0"
    assert missing["deepspeed>=0.18"]["why"] == "not installed"
    assert all(item["required"] and "setup.sh" in item["how"] for item in missing.values())


def test_gpu_extras_are_asked_for_only_where_there_is_a_gpu():
    absent = dict.fromkeys(doctor.OPTIONAL)
    assert doctor.find_missing([], absent, NO_GPU) == []
    missing = doctor.find_missing([], absent, ONE_GPU)
    assert [item["what"] for item in missing] == list(doctor.OPTIONAL)
    assert not any(item["required"] for item in missing)


def test_a_cpu_torch_beside_a_gpu_driver_is_said():
    missing = doctor.find_missing([], {}, {"cuda_build": None, "driver_present": True, "devices": []})
    assert len(missing) == 1
    assert "built for CPU" in missing[0]["why"]


def test_page_and_json_agree(tmp_path, capsys):
    path = tmp_path / "sub" / "doctor.json"
    assert doctor.main(["--json", str(path)]) == 0
    facts = json.loads(path.read_text())
    page = capsys.readouterr().out
    assert facts["ok"] is True
    assert facts["attention"]["sdpa"] is True
    assert facts["machine"]["disk_free_gib"] > 0
    for row in facts["required"]:
        assert row["version"] in page


def test_a_required_package_missing_is_exit_code_1(monkeypatch, capsys):
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "peft" else real(name))
    assert doctor.main([]) == 1
    assert "peft>=0.18: not installed. Get it: bash scripts/setup.sh" in capsys.readouterr().out
