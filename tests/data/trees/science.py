"""Samples of the sources of `sources/science.yaml`."""

from __future__ import annotations

from pathlib import Path

from tests.data.trees.files import save_json, save_jsonl, save_picture


def ai2d(root: Path) -> int:
    """A picture with two questions, one with letters in it (kept in a folder of its own), one of the test."""
    folder = root / "ai2d"

    def question(number: str, answers: list[str], right: int, letters: bool = False) -> dict:
        return {"abcLabel": letters, "answerTexts": answers, "correctAnswer": right, "questionId": number}

    pictures = {
        "0.png": {
            "which of these define dairy item": question("0.png-0", ["c", "D", "b", "a"], 1, letters=True),
            "What eats grass?": question("0.png-1", ["Fox", "Hare", "Hawk", "Grass"], 1),
            "What eats the hare?": question("0.png-2", ["Fox", "Hare", "None", "Grass"], 0),
        },
        "10.png": {"What phase is it?": question("10.png-0", ["Full", "New"], 1)},
        "99.png": {"How many stages?": question("99.png-0", ["1", "2", "3", "4"], 3)},
    }
    for name, questions in pictures.items():
        save_json(folder / f"questions/{name}.json", {"imageName": name, "questions": questions})
        save_picture(folder / f"images/{name}")
    save_picture(folder / "abc_images/0.png")
    (folder / "ai2d_test_ids.csv").write_text("99\n1234\n", encoding="utf-8")
    return 3


def plotqa(root: Path) -> int:
    """Questions of three pictures in a row; answers are text, numbers and lists of them."""

    def asked(picture: int, question: str, answer: object, kind: str = "dot_line") -> dict:
        return {
            "image_index": picture,
            "qid": f"{picture}-{question[:3]}",
            "question_string": question,
            "answer": answer,
            "answer_bbox": {},
            "template": "structural",
            "type": kind,
            "question_id": 0,
        }

    pairs = [
        asked(0, "Does the line intersect?", "No"),
        asked(0, "What is the average rainfall\nper year?", 21.400000000000002),
        asked(0, "What are the years?", ["2001", "2002"]),
        asked(1, "How many bars are there?", 4, "vbar_categorical"),
        *[asked(2, f"Question {number}?", number / 10) for number in range(25)],
    ]
    save_json(root / "PlotQA/train/qa_pairs_V1.json", {"qa_pairs": pairs})
    for number in range(3):
        save_picture(root / f"PlotQA/train/png/{number}.png")
    return 3


def arxivqa(root: Path) -> int:
    entries = [
        {
            "id": "physics-8049",
            "image": "images/1501.00713_1.jpg",
            "options": ["A) Rises", "B) Falls", "C) Stays", "D) Oscillates"],
            "question": "What does the curve do?",
            "label": "B",
            "rationale": "It falls.",
        },
        {
            "id": "cs-1",
            "image": "images/cs0001_2.jpg",
            "options": ["(A) 10", "(B) 20", "-", "(C) 30"],
            "question": "How many layers are there?",
            "label": "C) 30",
            "rationale": "Counted.",
        },
        {
            "id": "math-2",
            "image": "images/math_2.jpg",
            "options": ["A. Yes.", "B. No."],
            "question": "Is the figure symmetric?",
            "label": "[A]".strip("[]"),
            "rationale": "",
        },
        {
            "id": "q-bio-3",
            "image": "images/bio_3.jpg",
            "options": ["Red", "Green", "Blue"],
            "question": "Which cells divide?",
            "label": "Green",
            "rationale": "",
        },
    ]
    save_jsonl(root / "ArxivQA/arxivqa.jsonl", entries)
    for entry in entries:
        save_picture(root / "ArxivQA" / str(entry["image"]))
    return len(entries)


def scienceqa(root: Path) -> int:
    """Of four questions three have pictures, one of them of the test; one has a hint."""

    def problem(question: str, choices: list[str], answer: int, image: str | None, split: str, hint: str = "") -> dict:
        return {
            "question": question,
            "choices": choices,
            "answer": answer,
            "hint": hint,
            "image": image,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "physics",
            "category": "Materials",
            "skill": "Identify",
            "lecture": "A material is ...",
            "solution": "Look.",
            "split": split,
        }

    problems = {
        "1": problem(
            "Which is the farthest north?", ["West Virginia", "Louisiana", "Arizona"], 0, "image.png", "train"
        ),
        "2": problem("Can it be answered?", ["yes", "no"], 1, "image.png", "val", "The passage below\nhas two lines."),
        "4": problem("Is it a sentence?", ["yes", "no"], 0, None, "train"),
        "5": problem("Which is hard?", ["silk", "rock", "wool", "wax", "cotton"], 1, "image.png", "test"),
    }
    save_json(root / "scienceqa/problems.json", problems)
    for number, given in problems.items():
        if given["image"]:
            save_picture(root / f"scienceqa/images/{given['split']}/{number}/image.png")
    return 3


MAKERS = {"ai2d": ai2d, "plotqa": plotqa, "arxivqa": arxivqa, "scienceqa": scienceqa}
