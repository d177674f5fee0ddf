"""Samples of the pretraining sources: LLaVA's file, COCO's captions, Visual Genome, img2dataset's tars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from tests.data.trees.files import picture_bytes, save_json, save_picture

VG_URL = "https://cs.stanford.edu/people/rak248"


def llava_558k(root: Path) -> int:
    folder = root / "LLaVA-Pretrain"
    names = ["00453/004539375.jpg", "00223/002239345.jpg", "00547/005476129.jpg"]
    questions = [
        "Render a clear and concise summary of the photo.\n<image>",
        "<image>\nWhat is this?",
        "<image>\nShare.",
    ]
    answers = ["select luxury furniture 3 - inch gel memory foam mattress topper", "a grey watch", "a boat\non a lake"]
    save_json(
        folder / "blip_laion_cc_sbu_558k.json",
        [
            {
                "id": Path(name).stem,
                "image": name,
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
            }
            for name, question, answer in zip(names, questions, answers, strict=True)
        ],
    )
    for name in names:
        save_picture(folder / "images" / name)
    return 3


def coco_captions(root: Path) -> int:
    images = [
        {"license": 3, "file_name": "000000391895.jpg", "height": 360, "width": 640, "id": 391895},
        {"license": 4, "file_name": "000000522418.jpg", "height": 480, "width": 640, "id": 522418},
    ]
    captions = [
        (391895, 770337, "A man with a red helmet on a small moped on a dirt road. "),
        (391895, 771687, "Man riding a motor bike on a dirt road on the countryside."),
        (522418, 681330, "A woman wearing a net on her head cutting a cake. "),
        (522418, 688644, "A woman cutting a large white sheet cake."),
    ]
    save_json(
        root / "coco/annotations/captions_train2017.json",
        {
            "info": {"description": "COCO 2017 Dataset", "version": "1.0", "year": 2017},
            "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution"}],
            "images": images,
            "annotations": [{"image_id": image, "id": one, "caption": caption} for image, one, caption in captions],
        },
    )
    for image in images:
        save_picture(root / "coco/train2017" / str(image["file_name"]))
    return 4


def vg_pictures(root: Path) -> None:
    """image_data.json and its two pictures, one in each folder."""
    names = {1: "VG_100K_2/1.jpg", 2: "VG_100K/2.jpg"}
    save_json(
        root / "vg/image_data.json",
        [
            {
                "width": 800,
                "url": f"{VG_URL}/{name}",
                "height": 600,
                "image_id": identity,
                "coco_id": None,
                "flickr_id": None,
            }
            for identity, name in names.items()
        ],
    )
    for name in names.values():
        save_picture(root / "vg" / name)


def visual_genome(root: Path) -> int:
    vg_pictures(root)

    def region(image: int, number: int, phrase: str, box: tuple[int, int, int, int]) -> dict[str, object]:
        x, y, width, height = box
        place = {"x": x, "y": y, "width": width, "height": height}
        return {"region_id": number, "image_id": image, "phrase": phrase, **place}

    clock = region(1, 1382, "the clock is green in colour", (421, 57, 82, 139))
    regions = {
        1: [clock, clock | {"region_id": 1390}, region(1, 1383, "shade is along the street ", (194, 372, 210, 63))],
        2: [region(2, 2000, "a man", (-4, 0, 900, 300))],
    }
    save_json(
        root / "vg/region_descriptions.json", [{"id": image, "regions": found} for image, found in regions.items()]
    )
    return 3


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """An uncompressed tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def img2dataset(root: Path, source: str) -> int:
    """Two shards of pairs, with their statistics beside them."""
    for shard, captions in enumerate([["a very typical bus station", "sierra looked\nstunning"], ["interior design"]]):
        members = []
        for index, caption in enumerate(captions):
            key = f"{shard:05d}{index:04d}"
            meta = {"caption": caption, "url": f"http://x.example/{key}.jpg", "key": key, "status": "success"}
            members += [
                (f"{key}.jpg", picture_bytes(f"{source}-{key}", "JPEG")),
                (f"{key}.txt", caption.encode()),
                (f"{key}.json", json.dumps(meta).encode()),
            ]
        tar_of(root / source / f"{shard:05d}.tar", members)
        save_json(root / source / f"{shard:05d}_stats.json", {"count": len(captions), "successes": len(captions)})
    return 3


MAKERS = {
    "llava-558k": llava_558k,
    "coco-captions": coco_captions,
    "visual-genome": visual_genome,
    "cc3m": lambda root: img2dataset(root, "cc3m"),
    "cc12m": lambda root: img2dataset(root, "cc12m"),
    "sbu": lambda root: img2dataset(root, "sbu"),
    "laion": lambda root: img2dataset(root, "laion"),
}
