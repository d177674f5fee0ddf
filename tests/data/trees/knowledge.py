"""Samples of the knowledge sources."""

from __future__ import annotations

from pathlib import Path

from tests.data.trees.files import picture_bytes, save_json, save_jsonl, save_picture
from tests.data.trees.layouts import save_parquet, save_table


def viquae(root: Path) -> int:
    """Four questions about three pictures, the fields as viquae_dataset has them."""
    images = ["512px-Alpha Tower.jpg", "512px-Beta_(ship).jpg", "512px-Γάμμα.jpg"]
    for image in images:
        save_picture(root / "viquae/images" / image)

    def entry(number: int, image: str, question: str, answers: list[str]) -> dict:
        return {
            "id": f"viquae_{number}",
            "input": question,
            "original_question": question.replace("this", "the Alpha"),
            "output": {"answer": answers, "original_answer": answers[0], "provenance": [{"wikipedia_id": ["12"]}]},
            "image": image,
            "meta": {"mention": {"start": 3, "text": "the Alpha"}},
            "kilt_id": f"sfq_{number}",
            "url": f"http://upload.wikimedia.org/{image}",
            "wikidata_id": f"Q{number}",
        }

    entries = [
        entry(1, images[0], "In which city is this tower?", ["Lisbon", "Lisboa"]),
        entry(2, images[1], "Who built this ship?", ["Ada Moor"]),
        entry(3, images[0], "In which year was this tower opened?", ["1902", "nineteen oh two"]),
        entry(4, images[2], "Which river does this bridge cross?", ["Tagus"]),
    ]
    save_jsonl(root / "viquae/train.jsonl", entries)
    return 3


def kvqa(root: Path) -> int:
    """An object of pictures with parallel lists; the last has no question."""
    entries = {
        "21105": {
            "NamedEntities": ["Ada Moor"],
            "Qids": ["Q1"],
            "Questions": ["Who is in the image?", "How many people are in the image?", "Is the person a painter?"],
            "ParaQuestions": ["Who can be seen?", "What is the number of people?", "Does the person paint?"],
            "Answers": ["Ada Moor", 1, "Yes"],
            "Type of Question": [["1-hop"], ["counting"], ["Boolean", "1-hop"]],
            "imgPath": "KVQAimgs/21105.jpg",
            "split": [1, 1, 1, 1, 1],
            "wikiCap": "Moor in 1902",
        },
        "7": {
            "NamedEntities": ["Ben Oak", "Cy Elm"],
            "Qids": ["Q2", "Q3"],
            "Questions": ["Who is to the left of Cy Elm?"],
            "ParaQuestions": ["Who stands left of Cy Elm?"],
            "Answers": ["Ben Oak"],
            "Type of Question": [["spatial"]],
            "imgPath": "KVQAimgs/7.png",
            "split": [2, 1, 1, 1, 1],
            "wikiCap": "",
        },
    }
    for entry in entries.values():
        save_picture(root / "kvqa" / str(entry["imgPath"]))
    save_json(root / "kvqa/dataset.json", entries)
    return 2


def websrc(root: Path) -> int:
    """Two websites for training with three pages, one for validation. An id is domain, website, page, question: auto
    03, page 00542 of it, ..."""
    columns = ["question", "id", "element_id", "answer_start", "answer"]
    pages = {
        "auto/03": [
            ("What is the price, in dollars?", "au030054200000", 31, 0, "10,995"),
            ("Is it automatic?", "au030054200001", -1, 1, "yes"),
            ("What is the colour?", "au030056200000", 12, 4, 'pearl "white"'),
        ],
        "sports/01": [("Who won?", "sp010000100001", 7, 0, "The Reds")],
        "auto/08": [("Who made it?", "au080000100000", 7, 0, "Alda")],
    }
    for site, rows in pages.items():
        save_table(root / "websrc" / site / "dataset.csv", columns, rows)
        for row in rows:
            page = root / "websrc" / site / "processed_data" / f"{row[1][2:9]}.png"
            save_picture(page)
            page.with_suffix(".html").write_text("<p tid=0></p>")
    return 3


def okvqa(root: Path) -> int:
    """OK-VQA's pair of files with two questions, and A-OKVQA's file with two."""
    folder = root / "okvqa"
    asked = [
        {"image_id": 51606, "question": "What is the hairstyle of the blond called?", "question_id": 516065},
        {"image_id": 81721, "question": "How old do you have to be to do this?", "question_id": 817215},
    ]
    said = {516065: ["pony tail"] * 4 + ["braid"], 817215: ["16", "18", "18", "16", "18"]}
    answered = [
        {
            "image_id": entry["image_id"],
            "question_id": entry["question_id"],
            "question_type": "eight",
            "answer_type": "other",
            "confidence": 3,
            "answers": [
                {"answer_id": index + 1, "raw_answer": one, "answer_confidence": "yes", "answer": one}
                for index, one in enumerate(said[int(entry["question_id"])])
            ],
        }
        for entry in asked
    ]
    info = {"info": {"version": "1.0"}, "license": {}, "data_subtype": "train2014", "data_type": "mscoco"}
    save_json(folder / "OpenEnded_mscoco_train2014_questions.json", info | {"questions": asked})
    save_json(folder / "mscoco_train2014_annotations.json", info | {"annotations": answered})
    choices = [
        (299207, "22MexNkBPpdZGX6sxbxVBH", ["a hat", "a map", "a cup", "a bell"], 3),
        (9, "2BEiRHv9TXwkdFmxu55xKR", ["red", "blue", "green", "white"], 0),
    ]
    save_json(
        folder / "aokvqa_v1p0_train.json",
        [
            {
                "split": "train",
                "image_id": image,
                "question_id": identity,
                "question": "What is on the table?",
                "choices": options,
                "correct_choice_idx": right,
                "direct_answers": [options[right]] * 10,
                "difficult_direct_answer": False,
                "rationales": ["It is there."] * 3,
            }
            for image, identity, options, right in choices
        ],
    )
    for image in (51606, 81721):
        save_picture(root / f"coco/train2014/COCO_train2014_{image:012d}.jpg")
    for image in (299207, 9):
        save_picture(root / f"coco/train2017/{image:012d}.jpg")
    return 4


def volcano(root: Path) -> int:
    """LLaVA-like records: of a picture, of several turns, and without a picture."""

    def turns(*said: str) -> list[dict]:
        return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(said)]

    image = "coco/train2017/000000000025.jpg"
    save_picture(root / image)
    revise = "Correct it with the feedback.\nFeedback: the hat is red.\nAnswer: a blue hat"
    entries = [
        {"id": "v1", "image": image, "conversations": turns("<image>\nWhat is worn?", "A blue hat.")},
        {"id": "v2", "image": image, "conversations": turns(f"{revise}\n<image>", "A red hat.", "Sure?", "Yes.")},
        {"id": "v3", "conversations": turns("What is 2 + 2?", "4")},
    ]
    save_json(root / "volcano/volcano-train.json", entries)
    return 3


def rlaif_v(root: Path) -> int:
    """Two files of parquet, pictures as {bytes, path}."""
    names = (
        "ds_name",
        "image",
        "question",
        "chosen",
        "rejected",
        "origin_dataset",
        "origin_split",
        "idx",
        "image_path",
    )

    def row(number: int, question: str) -> dict:
        picture = {"bytes": picture_bytes(f"rlaif{number}", "JPEG"), "path": f"{number}.jpg"}
        split = '{"model": "OmniLMM", "type": "detailed_description"}'
        values = ("RLAIF-V", picture, question, f"Chosen {number}.", f"Rejected {number}.", "VQAv2", split, number, "x")
        return dict(zip(names, values))

    save_parquet(root / "rlaif-v/RLAIF-V-Dataset_000.parquet", [row(0, "What is shown?"), row(1, "Describe it.")])
    save_parquet(root / "rlaif-v/RLAIF-V-Dataset_001.parquet", [row(2, "Why?\nSay in detail.")])
    return 3


MAKERS = {
    "viquae": viquae,
    "kvqa": kvqa,
    "websrc": websrc,
    "okvqa": okvqa,
    "volcano": volcano,
    "rlaif-v": rlaif_v,
}
