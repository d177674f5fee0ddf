"""Whether pictures are there, against the file system's own answer."""

from __future__ import annotations

import os
import random

import pytest

from llava_sv.data.mix_pictures import Pictures


@pytest.mark.parametrize("names_held", [1, 7, 1 << 20])
def test_the_answers_are_the_file_systems(tmp_path, names_held):
    random_ = random.Random(0)
    names = [f"{folder}{number}.png" for folder in ("", "a/", "a/b/", "c d/") for number in range(6)]
    for name in random_.sample(names, 12):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name, target in (("a/link.png", tmp_path / names[0]), ("a/broken.png", tmp_path / "unmounted")):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
        names.append(name)
    (tmp_path / names[0]).write_bytes(b"")
    pictures = Pictures(tmp_path, names_held)
    asked = [random_.choice([*names, "nowhere/0.png", "a/b/c/0.png"]) for _ in range(300)]
    asked += ["a/link.png", "a/broken.png"]
    answers = [pictures.has(name) for name in asked]
    assert answers == [(tmp_path / name).is_file() for name in asked]
    assert True in answers
    assert False in answers


def test_of_a_member_the_container_is_looked_for(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    pictures = Pictures(tmp_path)
    assert pictures.has("a.tar::b/c.png@512+9")
    assert not pictures.has("b.tar::b/c.png@512+9")


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(b"")
    listed = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(os.path.basename(path)) or real(path))
    pictures = Pictures(tmp_path)
    assert all(pictures.has(f"{folder}/0.png") for folder in "abab")
    assert listed == ["a", "b"]
