"""`llava-sv doctor`: versions against pyproject's ranges, and what is said to be missing."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from llava_sv import doctor, extras

REQUIRES = [
    "torch>=2.11",
    "transformers>=5.13,<6",
    "peft>=0.18",
    'tomli>=2; python_version < "3.0"',
    'deepspeed>=0.18; extra == "train"',
    'wandb>=0.21; extra == "train"',
    'llava-sv[train]; extra == "dev"',
    'pytest>=8; extra == "dev"',
    'flash-attn>=2.7; extra == "flash"',
]
"""Metadata such as the installed package's, which may be older than this tree's."""


@pytest.fixture(autouse=True)
def requires(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)


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
    assert set(rows) == {"torch", "transformers", "peft"}
    assert [row["name"] for row in doctor.required_packages("train")] == ["deepspeed", "wandb"]


def test_too_old_and_absent_packages_are_missing(monkeypatch):
    versions = {"torch": "2.5.0", "peft": None, "deepspeed": "0.17.0", "wandb": None}
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: versions[name] if name in versions else real(name))
    rows = {row["name"]: row for row in doctor.required_packages()}
    assert not rows["torch"]["ok"]
    assert not rows["peft"]["ok"]
    training = doctor.required_packages("train")
    *required, last = doctor.find_missing(list(rows.values()), {}, NO_GPU, training)
    missing = {item["what"]: item for item in required}
    assert missing["torch>=2.11"]["why"] == "found 2.5.0"
    assert missing["peft>=0.18"]["why"] == "not installed"
    assert all(item["required"] and item["how"] == "bash scripts/setup.sh" for item in missing.values())
    assert (last["what"], last["required"]) == ("deepspeed (found 0.17.0), wandb", False)


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


def test_without_what_training_takes_the_exit_code_is_0_and_pip_is_named_where_no_clone_is(monkeypatch, capsys):
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name in ("deepspeed", "wandb") else real(name))
    monkeypatch.setattr(extras, "SETUP", Path("/nowhere/setup.sh"))
    assert doctor.main([]) == 0
    page = capsys.readouterr().out
    assert "  --  deepspeed       -              >=0.18 (training)\n" in page
    assert 'deepspeed, wandb: what training, data files and charts take beside the rest. Get it: pip install "' in page
