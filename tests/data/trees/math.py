"""Samples of the sources of `sources/math.yaml`."""

from __future__ import annotations

from pathlib import Path

from tests.data.trees.files import save_json, save_picture
from tests.data.trees.layouts import pixels, save_parquet


def said(question: str, answer: str) -> list[dict[str, str]]:
    """One exchange, as LLaVA writes it."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def mathverse(root: Path) -> int:
    direct = "please directly answer the question and provide the correct option letter, e.g., A, B, C, D."
    rows = [
        {
            "sample_index": "1",
            "problem_index": "1",
            "problem_version": "Text Dominant",
            "question": "As shown, angle 1 = 40°, then angle 2 is\nChoices:\nA:50°\nB:40°\nC:140°\nD:130°",
            "image": pixels("images_version_1-4_image_1.png"),
            "answer": "B",
            "question_type": "multi-choice",
            "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
            "query_wo": f"Please directly answer.\nQuestion: As shown, angle 1 = 40°, {direct}",
            "query_cot": "Please first conduct reasoning.",
            "question_for_eval": "As shown, angle 1 = 40°",
        },
        {
            "sample_index": "5",
            "problem_index": "1",
            "problem_version": "Vision Only",
            "question": "",
            "image": pixels("images_version_5_image_1.png"),
            "answer": "B",
            "question_type": "multi-choice",
            "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
            "query_wo": f"According to the question shown in the image, {direct}",
            "query_cot": "According to the question shown in the image, please first conduct reasoning.",
            "question_for_eval": "As shown, angle 1 = 40°",
        },
        {
            "sample_index": "6",
            "problem_index": "2",
            "problem_version": "Text Lite",
            "question": "Find the area of the shaded region.",
            "image": pixels("images_version_1-4_image_2.png"),
            "answer": "12 + \\pi",
            "question_type": "free-form",
            "metadata": {"split": "testmini", "source": "Geometry3K", "subject": "Plane Geometry", "subfield": "Area"},
            "query_wo": "Please directly answer.\nQuestion: Find the area of the shaded region.",
            "query_cot": "Please first conduct reasoning.",
            "question_for_eval": "Find the area of the shaded region.",
        },
    ]
    save_parquet(root / "MathVerse/testmini.parquet", rows)
    return 3


def tabmwp(root: Path) -> int:
    common = {
        "table_title": None,
        "table": "cat toy | $0.75\nbeads | $0.06",
        "table_for_pd": {"Item": ["cat toy", "beads"], "Price": ["$0.75", "$0.06"]},
        "row_num": 2,
        "column_num": 2,
        "split": "train",
    }
    problems = {
        "1": common
        | {
            "question": "How much more does a cat toy cost than beads?",
            "choices": None,
            "answer": "0.69",
            "unit": "$",
            "solution": "Subtract the price of beads from the price of a cat toy.\n\n$0.75 - $0.06 = $0.69",
            "ques_type": "free_text",
            "ans_type": "decimal_number",
            "grade": 2,
        },
        "3": common
        | {
            "question": "Is the price a function of the item?",
            "choices": ["yes", "no"],
            "answer": "yes",
            "unit": None,
            "solution": "Each item has one price. The answer is yes.",
            "ques_type": "multi_choice",
            "ans_type": "boolean_text",
            "grade": 8,
        },
        "24": common
        | {
            "question": "Wie viel kostet es?",
            "choices": None,
            "answer": "1,080",
            "unit": None,
            "solution": "1,080",
            "ques_type": "free_text",
            "ans_type": "integer_number",
            "grade": 4,
        },
    }
    save_json(root / "tabmwp/problems_train.json", problems)
    for number in problems:
        save_picture(root / f"tabmwp/tables/{number}.png")
    return len(problems)


def mathocr(root: Path) -> int:
    entries = [
        {"id": "f1", "image": "f1.png", "conversations": said("<image>\nWrite the formula in LaTeX.", "\\frac{a}{b}")},
        {"id": "f2", "image": "b/f2.png", "conversations": said("Write the formula in LaTeX.\n<image>", "x^{2} < 3")},
        {
            "id": "f3",
            "image": "f3.png",
            "conversations": said("<image>\nWrite it.", "\\sum_i x_i") + said("How many variables has it?", "One."),
        },
    ]
    save_json(root / "mathocr/train.json", entries)
    for entry in entries:
        save_picture(root / "mathocr/images" / str(entry["image"]))
    return len(entries)


def mathv360k(root: Path) -> int:
    hint = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
    entries = [
        {
            "id": "identity_0",
            "image": "TabMWP/images/29226.png",
            "conversations": said(f"<image>\n{hint}\nQuestion: Which is it?\nChoices:\n(A) shortage\n(B) surplus", "A"),
        },
        {
            "id": "identity_0",
            "image": "DVQA/images/bar_train_00123.png",
            "conversations": said("<image>\nQuestion: What is the value of the tallest bar?", "The answer is 9"),
        },
        {
            "id": "identity_1",
            "image": "GEOS/images/1 (2).png",
            "conversations": said("<image>\nQuestion: Find x.", "Because x + 1 = 3,\nthe answer is 2"),
        },
    ]
    save_json(root / "MathV360K/train_samples_all_tuning.json", entries)
    for entry in entries:
        save_picture(root / "MathV360K/data_images" / str(entry["image"]))
    return len(entries)


def geogpt4v(root: Path) -> int:
    for name, count in (("unigeo", 2), ("geoqa", 1)):
        entries = [
            {
                "id": str(index),
                "image": f"{name}/{index}.png",
                "conversations": said(f"<image>\nIn triangle ABC, AB = {index + 3}. Find BC.", f"BC = {index + 4}."),
            }
            for index in range(count)
        ]
        save_json(root / f"GeoGPT4V-1.0/{name}.json", entries)
        for entry in entries:
            save_picture(root / "GeoGPT4V-1.0/images" / str(entry["image"]))
    return 3


def geo170k(root: Path) -> int:
    folder = root / "Geo170K"
    asked = "Render a clear and concise description of a image about geometric shapes.\n<image>"
    captions = [{"image": f"geo3k/train/{n}.png", "conversations": said(asked, f"Angle {n} is right.")} for n in (1, 2)]
    question = "<image>\nFirst perform reasoning, then finally select the question from the choices.\nQuestion: Find x."
    answers = [{"image": "geo3k/train/1.png", "conversations": said(question, "x = 2, so the answer is: Answer:B")}]
    save_parquet(folder / "data/alignment-00000-of-00001.parquet", captions)
    save_parquet(folder / "data/qa_tuning-00000-of-00001.parquet", answers)
    for entry in captions:
        save_picture(folder / "images" / str(entry["image"]))
    return 3


MAKERS = {
    "mathverse": mathverse,
    "tabmwp": tabmwp,
    "mathocr": mathocr,
    "mathv360k": mathv360k,
    "geogpt4v": geogpt4v,
    "geo170k": geo170k,
}
