"""Samples of the sources of visual question answering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.data.trees.files import picture_bytes, save_json, save_picture
from tests.data.trees.layouts import save_parquet, save_table
from tests.data.trees.pretrain import vg_pictures

BOX = {"x": 80, "y": 60, "width": 400, "height": 300}


def save_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    save_table(path, list(rows[0]), [list(row.values()) for row in rows])


def crepe(root: Path) -> int:
    vg_pictures(root)
    atom = [
        {
            "image_id": 1,
            **BOX,
            "caption": "man on bench",
            "hard_negs": str(["dog on bench", "man on horse", "man's hat"]),
        },
        {"image_id": 2, **BOX, "caption": "red kite", "hard_negs": str([f"{word} kite" for word in "abcde"])},
    ]
    swap = [{"image_id": 2, **BOX, "caption": "cup, left of jug", "hard_negs": str(["jug, left of cup"])}]
    folder = root / "crepe/prod_hard_negatives"
    save_rows(folder / "atom/prod_vg_hard_negs_atom_complexity_4.csv", atom)
    save_rows(folder / "swap/prod_vg_hard_negs_swap_complexity_5.csv", swap)
    return 3


def imagenet(root: Path) -> int:
    classes = {
        "n01440764": "tench, Tinca tinca",
        "n01443537": "goldfish, Carassius auratus",
        "n01484850": "great white shark, white shark, man-eater",
        "n02012849": "crane",
        "n03126707": "crane",
        "n03642806": "laptop, laptop computer",
    }
    folder = root / "imagenet"
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{wnid} {names}\n" for wnid, names in classes.items())
    (folder / "LOC_synset_mapping.txt").write_text(lines, encoding="utf-8")
    names = [f"{wnid}_{number}" for wnid in classes for number in (18, 10040)]
    rows = [{"ImageId": name, "PredictionString": f"{name[:9]} 111 108 370 230 "} for name in names]
    save_rows(folder / "LOC_train_solution.csv", rows)
    for name in names:
        save_picture(folder / "ILSVRC/Data/CLS-LOC/train" / name[:9] / f"{name}.JPEG")
    return len(names)


def vqa_rad(root: Path) -> int:
    asked = [
        ("are regions of the brain infarcted?", "yes"),
        ("which side?", "Right"),
        ("What lobe is affected? ", "left lower lobe"),
    ]
    rows = [
        {"image": {"bytes": picture_bytes(f"rad{number}"), "path": None}, "question": question, "answer": answer}
        for number, (question, answer) in enumerate(asked)
    ]
    save_parquet(root / "vqa-rad/data/train-00000-of-00001-eb8844602202be60.parquet", rows)
    return 3


def people(*answers: str) -> list[dict[str, Any]]:
    return [
        {"answer": answer, "answer_confidence": "maybe", "answer_id": number}
        for number, answer in enumerate(answers, 1)
    ]


def vqav2(root: Path) -> int:
    asked = [
        (458752, 0, "What is this photo taken looking through?", "net", people("net", "netting", "net")),
        (458752, 1, "What position is this man playing?", "pitcher", people("pitcher", "catcher", "pitcher")),
        (262146, 0, "What color is the snow?", "", people("white", "grey", "white")),
        (524291, 0, "Is the sky blue?", "yes", people("yes", "yes", "no")),
    ]
    save_json(
        root / "vqav2/v2_OpenEnded_mscoco_train2014_questions.json",
        {
            "info": {"version": "2.0"},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "license": {"name": "Creative Commons Attribution 4.0 International License"},
            "data_subtype": "train2014",
            "questions": [
                {"image_id": image, "question": question, "question_id": image * 1000 + number}
                for image, number, question, _, _ in asked
            ],
        },
    )
    save_json(
        root / "vqav2/v2_mscoco_train2014_annotations.json",
        {
            "info": {"version": "2.0"},
            "data_type": "mscoco",
            "annotations": [
                {
                    "question_type": "what",
                    "multiple_choice_answer": answer,
                    "answers": answers,
                    "image_id": image,
                    "answer_type": "other",
                    "question_id": image * 1000 + number,
                }
                for image, number, _, answer, answers in reversed(asked)
            ],
        },
    )
    for image, *_ in asked:
        save_picture(root / f"coco/train2014/COCO_train2014_{image:012d}.jpg")
    return 3


def vizwiz(root: Path) -> int:
    asked = [
        ("What's the name of this product?", people("basil leaves", "basil", "basil leaves"), 1),
        ("Can you tell me what is in this can please?", people("unanswerable", "soda", "unanswerable"), 0),
        ("Is this enchilada sauce or is this tomatoes?  Thank you.", people("tomatoes", "", "tomatoes"), 1),
    ]
    save_json(
        root / "vizwiz/Annotations/train.json",
        [
            {
                "image": f"VizWiz_train_{number:08d}.jpg",
                "question": question,
                "answers": [
                    {"answer_confidence": one["answer_confidence"], "answer": one["answer"]} for one in answers
                ],
                "answer_type": "other",
                "answerable": answerable,
            }
            for number, (question, answers, answerable) in enumerate(asked)
        ],
    )
    for number in range(3):
        save_picture(root / f"vizwiz/train/VizWiz_train_{number:08d}.jpg")
    return 3


MAKERS = {"crepe": crepe, "imagenet-multitask": imagenet, "vqa-rad": vqa_rad, "vqav2": vqav2, "vizwiz": vizwiz}
