"""Layouts that several sources share: tables, parquet with pictures, the Cauldron's, mPLUG's DocOwl's."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.trees.files import picture_bytes, save_jsonl, save_picture


def save_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([columns, *rows])
    return path


def save_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def pixels(name: str) -> dict[str, Any]:
    """A picture as a column holds it."""
    return {"bytes": picture_bytes(name), "path": name}


def cauldron(path: Path, source: str, rows: list[tuple[list[str], list[tuple[str, str]]]]) -> Path:
    """Rows of (pictures' names, (question, answer) pairs) as the Cauldron and Docmatix hold them: lists of {bytes,
    path} and of {user, assistant, source}."""
    return save_parquet(
        path,
        [
            {
                "images": [{"bytes": picture_bytes(name), "path": None} for name in names],
                "texts": [{"user": asked, "assistant": said, "source": source} for asked, said in pairs],
            }
            for names, pairs in rows
        ],
    )


def asked_by_owl(
    image: str, question: str, answer: str, task: str = "qa_sft", dataset: str = "DocVQA"
) -> dict[str, Any]:
    """An entry of DocStruct4M, DocReason25K or DocDownstream."""
    said = [{"role": "user", "content": f"<|image|>{question}"}, {"role": "assistant", "content": answer}]
    return {"image": [image], "messages": said, "task_name": task, "dataset_name": dataset}


def docdownstream(root: Path) -> None:
    """DocDownstream-1.0, of which DeepForm and TabFact are parts: three questions about two pages, two about one."""
    form, table = "./imgs/DUE_Benchmark/DeepForm/pages/{}_page0.png", "./imgs/DUE_Benchmark/TabFact/pages/1-2_page0.png"
    asked = [
        (form.format("41-a"), "What is the advertiser?", "Friends of Ada", "DeepForm"),
        (table, "Ada scored 96. Is it right?", "Yes", "TabFact"),
        (form.format("41-a"), "What is the gross amount?", "$1,250.00", "DeepForm"),
        (table, "Ben scored 96. Is it right?", "No", "TabFact"),
        (form.format("77-b"), "What is the contract number?", "26789", "DeepForm"),
        ("./imgs/ChartQA/train/png/1.png", "How many bars?", "3", "ChartQA"),
    ]
    entries = [asked_by_owl(image, *said, "qa_sft", dataset) for image, *said, dataset in asked]
    save_jsonl(root / "docdownstream/train.jsonl", entries)
    for entry in entries:
        save_picture(root / "docdownstream" / entry["image"][0])
