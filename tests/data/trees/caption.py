"""Samples of the caption sources."""

from __future__ import annotations

from pathlib import Path

from tests.data.trees.files import save_json, save_jsonl, save_picture
from tests.data.trees.instruction import turns


def textcaps(root: Path) -> int:
    captions = [
        ("b2ae0f96dfbea5d8", "A clock that says 10:09."),
        ("b2ae0f96dfbea5d8", "A Casio watch on a wrist."),
        ("a7c8f1f5d1d3a0b2", "A book titled 'Oddbjørn'."),
        ("c1d2e3f4a5b6c7d8", "A can of Pepsi next to a sign\nthat reads 5."),
    ]
    save_json(
        root / "textcaps/TextCaps_0.1_train.json",
        {
            "dataset_type": "train",
            "dataset_name": "textcaps",
            "dataset_version": "0.1",
            "data": [
                {
                    "caption_str": caption,
                    "caption_id": number,
                    "image_id": image,
                    "image_classes": ["Watch"],
                    "flickr_original_url": "https://x.example/a.jpg",
                    "image_width": 1024,
                    "image_height": 730,
                    "set_name": "train",
                    "image_name": image,
                    "image_path": f"train/{image}.jpg",
                    "reference_strs": [caption],
                    "reference_tokens": [["<s>", "a", "</s>"]],
                }
                for number, (image, caption) in enumerate(captions)
            ],
        },
    )
    for image, _ in captions:
        save_picture(root / "textvqa/train_images" / f"{image}.jpg")
    return 3


def sharegpt_4o(root: Path) -> int:
    entries = [
        {
            "id": number,
            "image": f"a_{number}.jpg",
            "width": 24,
            "height": 16,
            "conversations": turns(
                "<image>\nWrite a detailed description.", f"The image shows {number} trees.\n\nMore."
            ),
        }
        for number in range(3)
    ]
    save_jsonl(root / "ShareGPT-4o/image_conversations/gpt-4o.jsonl", entries)
    for entry in entries:
        save_picture(root / "ShareGPT-4o/images" / str(entry["image"]))
    return 3


MAKERS = {"textcaps": textcaps, "sharegpt-4o": sharegpt_4o}
