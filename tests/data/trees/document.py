"""Samples of the document sources."""

from __future__ import annotations

from pathlib import Path

from tests.data.trees.files import picture_bytes, save_json, save_jsonl, save_picture
from tests.data.trees.layouts import asked_by_owl, cauldron, docdownstream, save_parquet


def deepform(root: Path) -> int:
    docdownstream(root)
    return 2


def tat_qa(root: Path) -> int:
    """Two tables, the first with two questions."""
    rows = [
        (["table0"], [("What was the revenue in 2019?\nShort answer.", "$1,452.4"), ("And in 2018?", "$1,202.9")]),
        (["table1"], [("What is the change in tax?\nShort answer.", "-12.6%")]),
    ]
    cauldron(root / "the_cauldron/tat_qa/train-00000-of-00001.parquet", "tat_qa", rows)
    return 2


def visualmrc(root: Path) -> int:
    """Two pages with their questions; regions and words beside them."""

    def entry(identity: str, *asked: tuple[str, str]) -> dict:
        box = {"x": 1, "y": 2, "width": 10, "height": 4}
        words = [{"word": "The", "confidence": 96, "bbox": box}]
        return {
            "id": identity,
            "license": "CC BY",
            "url": f"https://example.org/{identity}",
            "screenshot_filename": f"screenshot/{identity}.png",
            "image_filename": f"{identity}.png",
            "bounding_boxes": [{"id": "0", "structure": "Title/Heading", "shape": box, "ocr_info": words}],
            "qa_data": [
                {"question": {"text": question, "words": question.split()}, "answer": {"text": answer, "relevant": [0]}}
                for question, answer in asked
            ],
        }

    entries = [
        entry("00f", ("What is the rule?", "The rule is to wait."), ("Who set it?", "The council set it.")),
        entry("9aa", ("When was it founded?", "It was founded in 1902.")),
    ]
    save_jsonl(root / "visualmrc/data/train.jsonl", entries)
    for one in entries:
        save_picture(root / "visualmrc/images" / one["image_filename"])
    return 2


def docvqa(root: Path) -> int:
    """Three questions about two pages for training, one about a third for validation."""

    def entry(number: int, image: str, question: str, answers: list[str], split: str) -> dict:
        return {
            "questionId": number,
            "question": question,
            "question_types": ["form"],
            "image": f"documents/{image}",
            "docId": 279,
            "ucsf_document_id": image.split("_")[0],
            "ucsf_document_page_no": "1",
            "answers": answers,
            "data_split": split,
        }

    train = [
        entry(337, "xnbl0037_1.png", "what is the date mentioned in this letter?", ["1/8/93"], "train"),
        entry(338, "ffbf0227_5.png", "What is the total?", ["$ 12.50", "12.50", "12.50"], "train"),
        entry(339, "xnbl0037_1.png", "To whom is it sent?", ["Paul"], "train"),
    ]
    val = [entry(49153, "pybv0228_81.png", "What is the actual value per 1000?", ["0.28"], "val")]
    for split, data in (("train", train), ("val", val)):
        head = {"dataset_name": "SP-DocVQA Task 1", "dataset_version": "1.0", "dataset_split": split}
        save_json(root / f"docvqa/spdocvqa_qas/{split}_v1.0_withQT.json", head | {"data": data})
        for one in data:
            save_picture(root / "docvqa/spdocvqa_images" / Path(one["image"]).name)
    return 3


def sujet_finance(root: Path) -> int:
    """Rows whose questions are a list written as text, once as Python writes it and once as JSON."""
    rows = [
        {
            "doc_id": "AAPL_2020_3",
            "image": {"bytes": picture_bytes("page3"), "path": None},
            "document type": "10-K",
            "qa_pairs": "[{'question': \"What is Apple's revenue?\", 'answer': '$274.5 billion'}, "
            "{'question': 'In which year?', 'answer': '2020'}]",
        },
        {
            "doc_id": "AAPL_2020_4",
            "image": {"bytes": picture_bytes("page4"), "path": None},
            "document type": "10-K",
            "qa_pairs": '[{"question": "Is there a table?", "answer": "Yes, there is."}]',
        },
    ]
    save_parquet(root / "sujet-finance/data/train-00000-of-00001.parquet", rows)
    return 2


def docmatix(root: Path) -> int:
    """Documents of one and of three pages, in two files."""
    folder = root / "docmatix/data"
    rows = [
        (["a0"], [("What is it about?", "A report."), ("Who wrote it?", "Ada Moor.")]),
        (["b0", "b1", "b2"], [("What do the pages list?", "Names.")]),
    ]
    cauldron(folder / "train-00000-of-00002.parquet", "PDFA key: 244", rows)
    cauldron(folder / "train-00001-of-00002.parquet", "PDFA key: 245", [(["c0"], [("What is the title?", "Costs.")])])
    return 3


def docreason25k(root: Path) -> int:
    """Long answers, one with several turns."""
    entries = [
        asked_by_owl("./imgs/DUE_Benchmark/DocVQA/pngs/ftcn0000_1.png", "Explain: what is the date?", "It is\n1/8/93."),
        asked_by_owl("./imgs/ChartQA/train/png/8127.png", "Which is higher?", "The first, as 5 > 3."),
    ]
    entries[1]["messages"] += [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "As shown."}]
    save_jsonl(root / "docreason25k/detailed_explanation.jsonl", entries)
    for entry in entries:
        save_picture(root / "docreason25k" / entry["image"][0])
    return 2


def docstruct4m(root: Path) -> int:
    """Parsing and localization, in their own files."""
    page, table = "./imgs/CCpdf/pages/1.png", "./imgs/DUE_Benchmark/TabFact/pages/1-23316034-23_page0.png"
    parsed = asked_by_owl(page, "Recognize text in the image.", "<doc> Dear Sir,\n  Yours </doc>", "doc_parse")
    found = asked_by_owl(table, "Locate <ocr> 96 </ocr>", "<bbox>26,315,902,360</bbox>", "t2bbox_sft")
    save_jsonl(root / "docstruct4m/struct_aware_parse.jsonl", [parsed])
    save_jsonl(root / "docstruct4m/multi_grained_text_localization.jsonl", [found])
    for image in (page, table):
        save_picture(root / "docstruct4m" / image)
    return 2


MAKERS = {
    "deepform": deepform,
    "tat-qa": tat_qa,
    "visualmrc": visualmrc,
    "docvqa": docvqa,
    "sujet-finance": sujet_finance,
    "docmatix": docmatix,
    "docreason25k": docreason25k,
    "docstruct4m": docstruct4m,
}
