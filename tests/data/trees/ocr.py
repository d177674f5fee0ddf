"""Samples of the sources of `sources/ocr.yaml` that ask questions, or hold conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.data.trees.files import save_json, save_jsonl, save_picture
from tests.data.trees.layouts import pixels, save_parquet
from tests.data.trees.math import said


def tqa(root: Path) -> int:
    folder = root / "tqa_train_val_test/train"

    def question(number: str, image: str | None, asked: str, answers: dict[str, str], right: str) -> dict[str, Any]:
        given: dict[str, Any] = {
            "answerChoices": {
                key: {"idStructural": f"{key}.", "processedText": text, "rawText": f"{key}. {text}"}
                for key, text in answers.items()
            },
            "beingAsked": {"processedText": asked, "rawText": f"1. {asked}"},
            "correctAnswer": {"processedText": right, "rawText": right},
            "globalID": number,
            "questionType": "Multiple Choice" if image is None else "Diagram Multiple Choice",
        }
        return given if image is None else given | {"imageName": image, "imagePath": f"question_images/{image}"}

    lessons = [
        {
            "globalID": "L_0002",
            "lessonName": "earth science and its branches",
            "topics": {},
            "questions": {
                "diagramQuestions": {
                    "DQ_000001": question("DQ_000001", "a_1.png", "Which is it?", {"b": "Core", "a": "Crust"}, "b"),
                    "DQ_000002": question("DQ_000002", "a_1.png", "How many?", {"a": "1", "b": "2", "c": "3"}, "C"),
                },
                "nonDiagramQuestions": {
                    "NDQ_000001": question("NDQ_000001", None, "Is it old?", {"a": "true", "b": "false"}, "a")
                },
            },
        },
        {
            "globalID": "L_0003",
            "lessonName": "minerals",
            "topics": {},
            "questions": {
                "diagramQuestions": {
                    "DQ_000009": question("DQ_000009", "m 2.png", "Name D.", {"a": "Gold", "b": "Tin"}, "tin")
                },
                "nonDiagramQuestions": {},
            },
        },
    ]
    save_json(folder / "tqa_v1_train.json", lessons)
    for name in ("a_1.png", "m 2.png"):
        save_picture(folder / "question_images" / name)
    return 3


def hw_squad(root: Path) -> int:
    """Three pages, one of them without questions; one question has two answers that differ."""

    def page(name: str, text: str, asked: dict[str, list[tuple[int, int]]] | None) -> dict[str, Any]:
        words = [
            {"wordno": number, "text": word, "xmin": 10 * number, "ymin": 4, "xmax": 10 * number + 9, "ymax": 12}
            for number, word in enumerate(text.split())
        ]
        given: dict[str, Any] = {
            "document_id": name,
            "document_image": {
                "document_image": f"HW-SQuAD_document_images/{name}.jpg",
                "image_height": 16,
                "image_width": 24,
                "gold_standard_transcription": words,
            },
        }
        if asked is None:
            return given
        questions = [
            {
                "question_id": f"{name}_{number}",
                "question": question,
                "answers": [{"answer_start_word_no": start, "answer_end_word_no": end} for start, end in spans],
            }
            for number, (question, spans) in enumerate(asked.items())
        ]
        return given | {"qas": questions}

    asked = {"When was it founded?": [(5, 5), (4, 5), (4, 5)], "What was founded? ": [(0, 1)]}
    pages = [
        page("1_1", "The abbey was founded in 1132", asked),
        page("1_2", "Nothing is asked", None),
        page("1_3", "It has two towers", {"How many towers?": [(2, 2)]}),
    ]
    save_json(root / "HW-SQuAD/HW-SQuAD_train_1.0.json", {"dataset_name": "HW-SQuAD", "data": pages})
    for given in pages:
        save_picture(root / "HW-SQuAD" / given["document_image"]["document_image"])
    return 2


def textvqa(root: Path) -> int:
    def entry(number: int, image: str, question: str, answers: list[str]) -> dict[str, Any]:
        return {
            "question": question,
            "image_id": image,
            "image_classes": ["Belt"],
            "flickr_original_url": f"https://example.org/{image}_o.jpg",
            "image_width": 1024,
            "image_height": 664,
            "answers": answers,
            "question_tokens": question.lower().rstrip("?").split(),
            "question_id": number,
            "set_name": "train",
        }

    entries = [
        entry(0, "0054c91397f2fe05", "what is the brand of phone?", ["nokia"] * 6 + ["toshiba"] + ["nokia"] * 3),
        entry(1, "0054c91397f2fe05", "what time is it?", ["10:08", "10 08", "10:08", *["unanswerable"] * 2]),
        entry(2, "005635e119b9f32f", "Which word?", ["a", "b"]),
    ]
    whole = {"dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": entries}
    save_json(root / "textvqa/TextVQA_0.5.1_train.json", whole)
    for given in entries:
        save_picture(root / f"textvqa/train_images/{given['image_id']}.jpg")
    return 3


def st_vqa(root: Path) -> int:
    def entry(number: int, dataset: str, image: str, question: str, answers: list[str]) -> dict[str, Any]:
        return {
            "question": question,
            "image": image,
            "dataset": dataset,
            "image_classes": ["Man"],
            "file_path": f"{dataset}/{image}",
            "file_name": image,
            "answers": answers,
            "question_id": number,
            "set_name": "train",
            "image_width": 640,
            "image_height": 480,
        }

    entries = [
        entry(3, "coco-text", "COCO_train2014_000000209563.jpg", "Which airline is it?", ["emirates"]),
        entry(7, "icdar", "1.jpg", "What is sold?", ["coffee", "Coffee"]),
        entry(8, "vizwiz", "VizWiz_train_000000000023.jpg", "What does the label say?", ["BASIL\nLEAVES"]),
    ]
    save_json(root / "ST-VQA/train_task_3.json", {"task_name": "ST-VQA-Task3", "data": entries})
    for given in entries:
        save_picture(root / "ST-VQA" / given["file_path"])
    return 3


def textocr_gpt4v(root: Path) -> int:
    names = ("0a1b", "0a2c", "0a3d")
    rows = [
        {
            "filename": f"{name}.jpg",
            "caption": f"DESCRIPTION\nA sign, {name}.\n\nTEXT\nOPEN",
            "caption_image": f"A sign, {name}.",
            "caption_text": "OPEN",
            "caption_condensed": f"A sign says 'OPEN'. It is {name}.",
        }
        for name in names
    ]
    save_jsonl(root / "textocr-gpt4v/train.jsonl", rows)
    for name in names:
        save_picture(root / f"textvqa/train_images/{name}.jpg")
    return len(rows)


def _conversations(folder: Path, asked: list[tuple[str, str, str]]) -> int:
    entries = [
        {"id": Path(image).stem, "image": image, "conversations": said(f"<image>\n{question}", answer)}
        for image, question, answer in asked
    ]
    save_json(folder / "train.json", entries)
    for image, _, _ in asked:
        save_picture(folder / "images" / image)
    return len(entries)


def ocrbench_kv(root: Path) -> int:
    total = "What is the content of the 'total' field? Use information from the image only."
    asked = [
        ("sroie/1.jpg", total, "9.00"),
        ("funsd/2.png", "What is in 'DATE:'?", "12/1\n1998"),
        ("3.jpg", total, "$1"),
    ]
    return _conversations(root / "ocrbench_kv", asked)


def ocr_vqa(root: Path) -> int:
    """Books of training, of validation and of the test."""

    def book(split: int, title: str, asked: dict[str, str]) -> dict[str, Any]:
        return {
            "imageURL": "http://example.org/51UWikWKmCL.jpg",
            "authorName": "Mark Young",
            "title": title,
            "genre": "Calendars",
            "questions": list(asked),
            "answers": list(asked.values()),
            "split": split,
        }

    books = {
        "761183272": book(1, "Mom's Wall Calendar", {"Who wrote this book?": "Mark Young", "Is it a comic?": "No"}),
        "0061565644": book(2, "How to Eat", {"What is the title of this book?": 'How to "Eat"'}),
        "1111": book(3, "Tests", {"Who wrote this book?": "Nobody"}),
    }
    save_json(root / "ocr_vqa/dataset.json", books)
    for number in books:
        save_picture(root / f"ocr_vqa/images/{number}.jpg")
    return 2


def screenqa(root: Path) -> int:
    entries = [
        {"image_id": 46, "question": "What is the rating?", "ground_truth": ["4.6", "4.6 stars"]},
        {"image_id": 46, "question": "Which tab is selected?", "ground_truth": ['"Apps" tab', "Apps", "Apps"]},
        {"image_id": 100, "question": "How long is the password?", "ground_truth": ["<no answer>"]},
    ]
    save_json(root / "screenqa/short_answers/train.json", entries)
    held_out = [{"image_id": 31, "question": "From whom are you protected?", "ground_truth": ["thieves"]}]
    save_json(root / "screenqa/short_answers/validation.json", held_out)
    for entry in entries + held_out:
        save_picture(root / f"rico/combined/{entry['image_id']}.jpg")
    return 4


def _onevision(root: Path, folder: str, asked: list[tuple[str, str, str]]) -> int:
    rows = [
        {
            "id": name,
            "image": pixels(f"{name}.png"),
            "conversations": said(f"<image>\n{question}", answer),
            "data_source": folder,
        }
        for name, question, answer in asked
    ]
    path = root / f"LLaVA-OneVision-Data/{folder}/train-00000-of-00001.parquet"
    save_parquet(path, rows)
    return len(rows)


def chrome_writing(root: Path) -> int:
    question = "What is the text in the image?"
    return _onevision(
        root, "chrome_writting", [(f"c{n}", question, text) for n, text in enumerate(["wor", "é", "x\ny"])]
    )


def k12_printing(root: Path) -> int:
    question = "Please extract the text in the image.\nAnswer with the text only."
    return _onevision(
        root, "k12_printing", [(f"k{n}", question, text) for n, text in enumerate(["2 + 3 =", "一", "_"])]
    )


def squad(root: Path) -> int:
    """Two articles; one paragraph is without questions."""
    articles = [
        {
            "title": "University_of_Notre_Dame",
            "paragraphs": [
                {
                    "context": "The statue stands\non the Main Building's dome. ",
                    "qas": [
                        {
                            "id": "5733",
                            "question": "What is on the dome?",
                            "answers": [{"answer_start": 4, "text": "statue"}],
                        },
                        {
                            "id": "5734",
                            "question": "Where does it stand?",
                            "answers": [
                                {"answer_start": 18, "text": "on the Main Building's dome"},
                                {"answer_start": 25, "text": "Main Building"},
                                {"answer_start": 25, "text": "Main Building"},
                            ],
                        },
                    ],
                },
                {"context": "Nothing is asked of this one.", "qas": []},
            ],
        },
        {
            "title": "Beyoncé",
            "paragraphs": [
                {
                    "context": "Beyoncé rose to fame in the late 1990s.",
                    "qas": [
                        {"id": "56be", "question": "When?", "answers": [{"answer_start": 28, "text": "late 1990s"}]}
                    ],
                }
            ],
        },
    ]
    save_json(root / "squad/train-v1.1.json", {"data": articles, "version": "1.1"})
    asked = {"id": "56d9", "question": "Who won?", "answers": [{"answer_start": 0, "text": "Denver"}]}
    held_out = {"title": "Super_Bowl_50", "paragraphs": [{"context": "Denver won.", "qas": [asked]}]}
    save_json(root / "squad/dev-v1.1.json", {"data": [held_out], "version": "1.1"})
    return 3


def docscan(root: Path) -> int:
    question = "Convert the page to text."
    asked = [("a/1.jpg", question, "Dear Sir,\n\nyours"), ("2.jpg", question, "Invoice 7"), ("3.jpg", question, "§ 1")]
    return _conversations(root / "docscan", asked)


MAKERS = {
    "tqa": tqa,
    "hw-squad": hw_squad,
    "textvqa": textvqa,
    "st-vqa": st_vqa,
    "textocr-gpt4v": textocr_gpt4v,
    "ocrbench-kv": ocrbench_kv,
    "ocr-vqa": ocr_vqa,
    "screenqa": screenqa,
    "chrome-writing": chrome_writing,
    "k12-printing": k12_printing,
    "squad": squad,
    "docscan": docscan,
}
