"""Samples of the sources of `sources/others.yaml`."""

from __future__ import annotations

from pathlib import Path

from tests.data.trees.files import save_json, save_picture
from tests.data.trees.layouts import pixels, save_parquet


def multimodal_self_instruct(root: Path) -> int:
    """Its question_id is the picture's, so that it repeats."""
    rows = [
        {
            "question_id": "20231127220121117781",
            "question": "<image>\nWhat is the lowest mortality rate recorded?",
            "image_path": "chart/20231127220121117781.png",
            "image": pixels("20231127220121117781.png"),
            "answer": "The answer is 6.81 for Australia in 2010..",
        },
        {
            "question_id": "20231127220121117781",
            "question": "<image>\nWhich country is it of?",
            "image_path": "chart/20231127220121117781.png",
            "image": pixels("20231127220121117781.png"),
            "answer": "Australia",
        },
        {
            "question_id": "7",
            "question": "<image>\nWhich way leads from A to B?\nGive all steps.",
            "image_path": "maze/7.png",
            "image": pixels("7.png"),
            "answer": "North\nEast",
        },
    ]
    save_parquet(root / "Multi-modal-Self-instruct/data/train-00000-of-00001.parquet", rows)
    return len(rows)


def sketchy_vqa(root: Path) -> int:
    folder = root / "safety_evaluation_benchmark_datasets/ood/sketchy-vqa"
    plain = [
        {"image": "skechydata/png/airplane/1.png", "question": "Is there an airplane in the image?", "answer": "yes"},
        {"image": "skechydata/png/alarm clock/81.png", "question": "Is there a bee in the image?", "answer": "no"},
    ]
    challenging = [{"image": "skechydata/png/zebra/9.png", "question": "Is this a zebra?", "answer": "yes"}]
    save_json(folder / "sketchy-vqa.json", plain)
    save_json(folder / "sketchy-challenging.json", challenging)
    for entry in plain + challenging:
        save_picture(folder / entry["image"])
    return 3


MAKERS = {"multimodal-self-instruct": multimodal_self_instruct, "sketchy-vqa": sketchy_vqa}
