"""Pretraining sources: their samples converted, against records written by hand; tars that are refused."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.data.converting import convert, picture_at, record, records, refusal, sample
from tests.data.trees.files import picture, picture_bytes
from tests.data.trees.pretrain import MAKERS, tar_of

CAPTION = "Provide a one-sentence caption for the provided image."


FIRST = {
    "llava-558k": record(
        "004539375",
        "LLaVA-Pretrain/images/00453/004539375.jpg",
        "Render a clear and concise summary of the photo.\n<image>",
        "select luxury furniture 3 - inch gel memory foam mattress topper",
    ),
    "coco-captions": record(
        "770337",
        "coco/train2017/000000391895.jpg",
        f"<image>\n{CAPTION}",
        "A man with a red helmet on a small moped on a dirt road.",
    ),
    "visual-genome": record(
        "1382",
        "vg/VG_100K_2/1.jpg",
        # x 421 of 800, y 57 of 600; the other corner at 503 and 196
        "<image>\nProvide a short description for this region: [0.53, 0.10, 0.63, 0.33].",
        "the clock is green in colour",
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_sample(name: str, tmp_path: Path) -> None:
    found = sample(name, tmp_path)
    if name in FIRST:
        assert found[0] == FIRST[name]


@pytest.mark.parametrize("name", ["cc3m", "cc12m", "sbu", "laion"])
def test_pairs_in_tars(name: str, tmp_path: Path) -> None:
    """Each reference is a span of its tar that holds the very picture of that key."""
    found = sample(name, tmp_path)
    said = [(one["id"], one["conversations"][1]["value"]) for one in found]
    assert said == [
        ("00000/000000000", "a very typical bus station"),
        ("00000/000000001", "sierra looked\nstunning"),
        ("00001/000010000", "interior design"),
    ]
    for one in found:
        shard, key = one["id"].split("/")
        assert one["conversations"][0]["value"] == f"<image>\n{CAPTION}"
        assert one["image"].startswith(f"{name}/{shard}.tar::{key}.jpg@")
        assert one["image"].endswith(f"+{len(picture_bytes(f'{name}-{key}', 'JPEG'))}")
        wanted = picture(f"{name}-{key}").getpixel((0, 0))
        there = picture_at(tmp_path, one["image"]).getpixel((0, 0))
        assert all(abs(a - b) < 4 for a, b in zip(wanted, there, strict=True))


def test_caption_from_the_json_member(tmp_path: Path) -> None:
    tar_of(
        tmp_path / "sbu/0.tar", [("a/k.jpg", picture_bytes("k", "JPEG")), ("a/k.json", b'{"top_caption": " A lake "}')]
    )
    (found,) = records("sbu", tmp_path, caption="json:top_caption", question="What is it?")
    assert [turn["value"] for turn in found["conversations"]] == ["<image>\nWhat is it?", "A lake"]
    assert found["id"] == "0/a/k"
    assert found["image"].startswith("sbu/0.tar::a/k.jpg@")


def test_a_tar_with_gaps(tmp_path: Path) -> None:
    """Keys without a part are named; the rest goes on. A folder's own member, and one after the last file, are none."""
    members = [
        ("1.jpg", picture_bytes("1")),
        ("1.txt", b"one"),
        ("2.jpg", picture_bytes("2")),
        ("3.txt", b"three"),
        ("4.jpg", picture_bytes("4")),
        ("4.txt", b" \n"),
        ("5.jpg", b""),
        ("5.txt", b"five"),
        ("6.jpg", picture_bytes("6")),
        ("6.txt", b"\xff\xfe"),
        ("7.JPG", picture_bytes("7")),
        ("7.txt", b"seven"),
    ]
    path = tar_of(tmp_path / "cc3m/00000.tar", members)
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    items = convert("cc3m", tmp_path)
    assert [item.record["id"] for item in items if item.record] == ["00000/1", "00000/7"]
    problems = {item.where: item.problem for item in items if item.record is None}
    assert list(problems) == [f"{path} member {key}" for key in "23456"]
    for said, problem in zip(["no .txt", "no picture", "empty", "no bytes", "utf-8"], problems.values(), strict=True):
        assert said in problem


def link(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("1.jpg")
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (link(tarfile.SYMTYPE), "member '1.jpg' is a link"),
        (link(tarfile.LNKTYPE), "member '1.jpg' is a link"),
        (link(tarfile.CHRTYPE), "member '1.jpg' is a device"),
        (tarfile.TarInfo("/etc/1.jpg"), "member '/etc/1.jpg' is absolute or climbs"),
        (tarfile.TarInfo("a/../../1.jpg"), "is absolute or climbs out of the tar"),
    ],
)
def test_tars_that_are_refused(member: tarfile.TarInfo, says: str, tmp_path: Path) -> None:
    path = tmp_path / "cc3m/00000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        tar.addfile(member, io.BytesIO(b""))
    assert says in refusal("cc3m", tmp_path)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("text", "is no tar"),
        ("gzip", "a compressed tar cannot be read"),
        ("cut in a picture", "cut off inside member '000000001.jpg'"),
        ("cut after a member", "is damaged or cut off at byte"),
        ("damaged header", "is damaged or cut off at byte"),
    ],
)
def test_damaged_tars(how: str, says: str, tmp_path: Path) -> None:
    """None ends silently: tarfile alone takes a damaged header for the end."""
    MAKERS["cc3m"](tmp_path)
    path = tmp_path / "cc3m/00000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        second = tar.getmembers()[3]
    damaged = {
        "text": b"this is no tar\n" * 99,
        "gzip": gzip.compress(whole),
        "cut in a picture": whole[: second.offset_data + 99],
        "cut after a member": whole[: second.offset],
        "damaged header": whole[: second.offset] + b"\7" * 512 + whole[second.offset_data :],
    }
    path.write_bytes(damaged[how])
    assert f"{path}: {says}" in refusal("cc3m", tmp_path)


def test_regions_repeated_are_one_and_boxes_stay_in_the_picture(tmp_path: Path) -> None:
    found = sample("visual-genome", tmp_path)
    assert [one["id"] for one in found] == ["1382", "1383", "2000"]
    assert "[0.00, 0.00, 1.00, 0.50]" in found[2]["conversations"][0]["value"]
    assert found[2]["image"] == "vg/VG_100K/2.jpg"


def test_regions_that_are_wrong_are_named(tmp_path: Path) -> None:
    MAKERS["visual-genome"](tmp_path)
    path = tmp_path / "vg/region_descriptions.json"
    given = json.loads(path.read_text())
    given[0]["regions"][2]["phrase"] = " "
    given[1]["regions"][0]["image_id"] = 77
    given.append({"id": 3})
    path.write_text(json.dumps(given))
    items = convert("visual-genome", tmp_path)
    assert [item.record["id"] for item in items if item.record] == ["1382"]
    problems = [(item.where, item.problem) for item in items if item.record is None]
    assert problems == [
        (f"{path} line 1 entry 0", "field 'phrase' is empty"),
        (f"{path} line 1 entry 1", "image 77 is not in image_data.json"),
        (f"{path} line 1 entry 2", "has no list 'regions'"),
    ]


def test_visual_genome_needs_its_list_of_pictures(tmp_path: Path) -> None:
    MAKERS["visual-genome"](tmp_path)
    (tmp_path / "vg/image_data.json").write_text('[{"image_id": 1}]')
    says = "image_data.json line 1: expected image_id, url, width and height"
    assert says in refusal("visual-genome", tmp_path)
    (tmp_path / "vg/image_data.json").unlink()
    assert "'visual-genome': image_data.json is not among its annotations" in refusal("visual-genome", tmp_path)


def test_coco_entries_that_are_wrong_are_named(tmp_path: Path) -> None:
    MAKERS["coco-captions"](tmp_path)
    path = tmp_path / "coco/annotations/captions_train2017.json"
    given = json.loads(path.read_text())
    given["annotations"][0]["image_id"] = 5
    del given["annotations"][1]["caption"]
    given["annotations"][2] = "text"
    path.write_text(json.dumps(given))
    items = convert("coco-captions", tmp_path)
    assert [item.record["id"] for item in items if item.record] == ["688644"]
    problems = [item.problem for item in items if item.record is None]
    assert problems == [
        "image_id 5 is not among the file's images",
        "has no field 'caption'",
        "is str, expected an object",
    ]
    assert all(item.where.startswith(f"{path} line 1 entry ") for item in items)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "expected a JSON object"),
        ("", "expected a JSON object"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}]}', "annotations"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{', "malformed JSON at line 1 column"),
    ],
)
def test_damaged_coco_files(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "coco/annotations/captions_train2017.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    message = refusal("coco-captions", tmp_path)
    assert message.startswith(f"{path}: ")
    assert says in message
