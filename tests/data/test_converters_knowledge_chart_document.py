"""Sources of knowledge, charts and documents: their samples through their catalogue entries, against records written
out by hand; damaged entries and damaged files."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_sv.data.converters.prompts import LETTER, SHORT
from llava_sv.data.records import check_record
from llava_sv.data.sources import catalogue
from llava_sv.errors import UserError
from tests.data.converting import convert, has_picture, inputs_of, record
from tests.data.trees import makers

GROUPS = ("knowledge", "chart", "document")
NAMES = [name for name, source in catalogue().items() if source.group in GROUPS]
COLLECTED = {  # names fixed by the paper's Tables 8 and 9
    "knowledge": {"viquae", "kvqa", "websrc", "okvqa", "volcano", "rlaif-v"},
    "chart": {
        *("chartqa", "iconqa", "infographicvqa", "mapqa", "tabfact", "chart2text", "dvqa", "chartbench", "mmc"),
    },
    "document": {
        *("deepform", "tat-qa", "visualmrc", "docvqa", "sujet-finance", "docmatix", "docreason25k", "docstruct4m"),
    },
}


def test_every_source_is_there():
    for group, names in COLLECTED.items():
        assert {name for name, source in catalogue().items() if source.group == group} == names
    marked = {name: catalogue()[name].contaminates for name in NAMES if catalogue()[name].contaminates}
    assert marked == {"docvqa": ("docvqa",), "kvqa": ("kvqa",), "chart2text": ("chart2text",)}


@pytest.mark.parametrize("name", NAMES)
def test_sample(name, tmp_path):
    """As many records as its maker drew, all sound, and each picture there."""
    count = makers()[name](tmp_path)
    items = convert(name, tmp_path)
    assert [item.problem for item in items if item.record is None] == []
    assert len(items) == count
    assert len({item.record["id"] for item in items}) == count
    for item in items:
        for image in check_record(item.record, item.where).images:
            assert has_picture(tmp_path, image), image


COLUMN = "the_cauldron/tat_qa/train-00000-of-00001.parquet::images"
PAGES = "docmatix/data/train-00000-of-00002.parquet::images"
ICONS = "iconqa/iconqa_data/iconqa/train"
EXPECTED: dict[str, list[dict]] = {
    "viquae": [
        record(
            *("viquae/viquae_1", "viquae/images/512px-Alpha Tower.jpg"),
            *(f"<image>\nIn which city is this tower?\n{SHORT}", "Lisbon"),
            *("In which year was this tower opened?", "1902"),
        )
    ],
    "kvqa": [
        record(
            *("kvqa/21105", "kvqa/KVQAimgs/21105.jpg"),
            *(f"<image>\nWho is in the image?\n{SHORT}", "Ada Moor"),
            *("How many people are in the image?", "1"),
            *("Is the person a painter?", "Yes"),
        ),
    ],
    "websrc": [
        record(
            *("websrc/au030054200000", "websrc/auto/03/processed_data/0300542.png"),
            *(f"<image>\nWhat is the price, in dollars?\n{SHORT}", "10,995"),
            *("Is it automatic?", "yes"),
        ),
        record(
            *("websrc/au030056200000", "websrc/auto/03/processed_data/0300562.png"),
            *(f"<image>\nWhat is the colour?\n{SHORT}", 'pearl "white"'),
        ),
    ],
    "okvqa": [
        record(
            *("okvqa/22MexNkBPpdZGX6sxbxVBH", "coco/train2017/000000299207.jpg"),
            *(f"<image>\nWhat is on the table?\nA. a hat\nB. a map\nC. a cup\nD. a bell\n{LETTER}", "D"),
        ),
        record(
            *("817215", "coco/train2014/COCO_train2014_000000081721.jpg"),
            *(f"<image>\nHow old do you have to be to do this?\n{SHORT}", "18"),
        ),
    ],
    "volcano": [
        record(
            *("volcano/v2", "coco/train2017/000000000025.jpg"),
            *("<image>\nCorrect it with the feedback.\nFeedback: the hat is red.\nAnswer: a blue hat", "A red hat."),
            *("Sure?", "Yes."),
        ),
        record("volcano/v3", None, "What is 2 + 2?", "4"),
    ],
    "rlaif-v": [
        record(
            *("rlaif-v/RLAIF-V-Dataset_001/0", "rlaif-v/RLAIF-V-Dataset_001.parquet::image/0"),
            *("<image>\nWhy?\nSay in detail.", "Chosen 2."),
        )
    ],
    "chartqa": [
        record(
            *("chartqa/train_human/1", "chartqa/ChartQA Dataset/train/png/two_col_80213.png"),
            *(f"<image>\nIs the sum of the two lowest bars above 8?\n{SHORT}", "No"),
        )
    ],
    "iconqa": [
        record(
            "iconqa/choose_img/7",
            [f"{ICONS}/choose_img/7/{file}.png" for file in ("image", "choice_0", "choice_1")],
            f"<image>\n<image>\n<image>\nWhich shape comes next?\nA. image 2\nB. image 3\n{LETTER}",
            "A",
        ),
        record(
            *("iconqa/choose_txt/10", f"{ICONS}/choose_txt/10/image.png"),
            *(f"<image>\nHow many dots are there?\nA. 1\nB. 2\nC. 3\n{LETTER}", "B"),
        ),
        record(
            *("iconqa/fill_in_blank/93589", f"{ICONS}/fill_in_blank/93589/image.png"),
            *(f"<image>\nHow many triangles are there?\n{SHORT}", "4"),
        ),
    ],
    "infographicvqa": [
        record(
            *("infographicvqa/65718", "infographicvqa/infographicsvqa_images/20471.jpeg"),
            *(f"<image>\nWhich social platform has heavy female audience?\n{SHORT}", "pinterest"),
            *("How many sections are there?", "4"),
        ),
        record(
            *("infographicvqa/65719", "infographicvqa/infographicsvqa_images/31231.jpeg"),
            *(f"<image>\nWhat percent is unused?\n{SHORT}", "12%"),
        ),
    ],
    "mapqa": [
        record(
            *("mapqa/train-00000-of-00001/1/1", "the_cauldron/mapqa/train-00000-of-00001.parquet::images/1/0"),
            *("<image>\nWhich states are in red?\nConcise answer only.", "Ohio, Utah."),
        )
    ],
    "tabfact": [
        record(
            *("tabfact/train/1", "docdownstream/imgs/DUE_Benchmark/TabFact/pages/1-2_page0.png"),
            *("<image>\nAda scored 96. Is it right?", "Yes"),
            *("Ben scored 96. Is it right?", "No"),
        )
    ],
    "chart2text": [
        record(
            *("chart2text/10/0", "chart2text/statista_dataset/dataset/imgs/10.png"),
            *("<image>\nSummarize this chart in a few sentences.", "Sales rose .\nThey fell in 2020 ."),
        )
    ],
    "dvqa": [
        record(
            *("dvqa/1", "dvqa/images/bar_train_00190001.png"),
            *(f"<image>\nHow many bars are there?\n{SHORT}", "three"),
            *("Is each bar a single solid color without patterns?", "yes"),
        )
    ],
    "chartbench": [
        record(
            *("chartbench/train/0/1", "chartbench/data/train/bar/vertical_single/chart_1/image.png"),
            *(f"<image>\nThis graph is a others chart, instead of bar chart.\n{SHORT}", "No"),
        ),
        record(
            *("chartbench/train/1", "chartbench/data/train/pie/ring/chart_0/image.png"),
            *(f"<image>\nWhat is the value of Tea?\n{SHORT}", "38.5"),
        ),
    ],
    "mmc": [
        record(
            "mmc/mmc_instruction_arxiv_text/1",
            "mmc/MMC-Instruction/mmc_instruction_arxiv_images/1408.0341v1-Figure6-1.png",
            *("<image>\nDescribe the trend.", "It rises.\nThen falls."),
        ),
        record(
            "mmc/mmc_instruction_non-arxiv_text/0",
            "mmc/MMC-Instruction/mmc_instruction_non-arxiv_images/two_col_1.png",
            *("<image>\nIs 2019 above 2018?", "true"),
        ),
    ],
    "deepform": [
        record(
            *("deepform/train/0", "docdownstream/imgs/DUE_Benchmark/DeepForm/pages/41-a_page0.png"),
            *(f"<image>\nWhat is the advertiser?\n{SHORT}", "Friends of Ada"),
            *("What is the gross amount?", "$1,250.00"),
        )
    ],
    "tat-qa": [
        record(
            *("tat-qa/train-00000-of-00001/0", f"{COLUMN}/0/0"),
            *("<image>\nWhat was the revenue in 2019?\nShort answer.", "$1,452.4"),
            *("And in 2018?", "$1,202.9"),
        )
    ],
    "visualmrc": [
        record(
            *("visualmrc/00f", "visualmrc/images/00f.png"),
            *("<image>\nWhat is the rule?", "The rule is to wait."),
            *("Who set it?", "The council set it."),
        )
    ],
    "docvqa": [
        record(
            *("docvqa/337", "docvqa/spdocvqa_images/xnbl0037_1.png"),
            *(f"<image>\nwhat is the date mentioned in this letter?\n{SHORT}", "1/8/93"),
            *("To whom is it sent?", "Paul"),
        ),
        record("docvqa/338", "docvqa/spdocvqa_images/ffbf0227_5.png", f"<image>\nWhat is the total?\n{SHORT}", "12.50"),
        record(
            *("docvqa/49153", "docvqa/spdocvqa_images/pybv0228_81.png"),
            *(f"<image>\nWhat is the actual value per 1000?\n{SHORT}", "0.28"),
        ),
    ],
    "sujet-finance": [
        record(
            *("sujet-finance/AAPL_2020_3", "sujet-finance/data/train-00000-of-00001.parquet::image/0"),
            *("<image>\nWhat is Apple's revenue?", "$274.5 billion"),
            *("In which year?", "2020"),
        ),
        record(
            *("sujet-finance/AAPL_2020_4", "sujet-finance/data/train-00000-of-00001.parquet::image/1"),
            *("<image>\nIs there a table?", "Yes, there is."),
        ),
    ],
    "docmatix": [
        record(
            *("docmatix/train-00000-of-00002/1", [f"{PAGES}/1/0", f"{PAGES}/1/1", f"{PAGES}/1/2"]),
            *("<image>\n<image>\n<image>\nWhat do the pages list?", "Names."),
        )
    ],
    "docreason25k": [
        record(
            *("docreason25k/detailed_explanation/1", "docreason25k/imgs/ChartQA/train/png/8127.png"),
            *("<image>\nWhich is higher?", "The first, as 5 > 3."),
            *("Why?", "As shown."),
        )
    ],
    "docstruct4m": [
        record(
            *("docstruct4m/struct_aware_parse/0", "docstruct4m/imgs/CCpdf/pages/1.png"),
            *("<image>\nRecognize text in the image.", "<doc> Dear Sir,\n  Yours </doc>"),
        )
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_records_by_hand(name, tmp_path):
    makers()[name](tmp_path)
    made = {item.record["id"]: item.record for item in convert(name, tmp_path) if item.record}
    for expected in EXPECTED[name]:
        assert made[expected["id"]] == expected


def damage_entry(path: Path) -> None:
    """Make the first entry of an annotation file useless; the rest stays."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        column = next(name for name in ("texts", "qa_pairs", "chosen") if name in table.column_names)
        values = [None, *table[column].to_pylist()[1:]]
        place = table.column_names.index(column)
        pq.write_table(table.set_column(place, column, pa.array(values, table[column].type)), path)
    elif path.suffix == ".csv":
        header, _, *rest = path.read_text().splitlines(keepends=True)
        path.write_text("".join([header, "What?,au039999900000,1,2,\n", *rest]))
    elif path.suffix == ".txt":
        path.write_text(" \n")
    elif path.suffix == ".jsonl":
        first, *rest = path.read_text().splitlines(keepends=True)
        path.write_text("".join([useless(json.loads(first)), "\n", *rest]))
    else:
        path.write_text(damaged_json(json.loads(path.read_text())))


def useless(entry: dict) -> str:
    """The entry with nothing left but what says that it belongs to the source."""
    return json.dumps({key: value for key, value in entry.items() if key == "dataset_name"})


def damaged_json(value: list | dict) -> str:
    if isinstance(value, list):
        return json.dumps([{}, *value[1:]])
    key = next((key for key in ("data", "annotations") if key in value), None)
    if key is not None:
        return json.dumps(value | {key: [{}, *value[key][1:]]})
    if "ques_type" in value:
        return json.dumps({"question": "What?"})
    return json.dumps(value | {next(iter(value)): {}})


@pytest.mark.parametrize("name", NAMES)
def test_damaged_entry(name, tmp_path):
    """It is named, with its file, and the others are as they were."""
    makers()[name](tmp_path)
    sound = [item.record for item in convert(name, tmp_path)]
    path = inputs_of(name, tmp_path).files[-1 if name == "volcano" else 0]
    if name in ("tabfact", "deepform"):
        lines = path.read_text().splitlines(keepends=True)
        mine = next(line for line in lines if catalogue()[name].options["where"]["dataset_name"] in line)
        path.write_text("".join(lines).replace(mine, useless(json.loads(mine)) + "\n", 1))
    elif name == "okvqa":
        path = inputs_of(name, tmp_path).files[2]
        damage_entry(path)
    else:
        damage_entry(path)
    items = convert(name, tmp_path)
    (problem,) = [item for item in items if item.record is None]
    assert problem.problem
    assert "\n" not in problem.problem
    assert str(path) in problem.where
    assert problem.where != str(path) or name in ("iconqa", "chart2text")
    others = [item.record for item in items if item.record]
    assert sum(before not in others for before in sound) <= 1 + (name in ("mapqa", "chartbench"))


@pytest.mark.parametrize("name", NAMES)
def test_damaged_file(name, tmp_path):
    """One line that names it."""
    makers()[name](tmp_path)
    path = inputs_of(name, tmp_path).files[0]
    if path.suffix in (".csv", ".txt"):
        path.write_bytes(b"question,id,answer\n\xff\xfe\xfa")
    else:
        data = path.read_bytes().rstrip()
        path.write_bytes(data[: len(data) - 3])
    with pytest.raises(UserError) as caught:
        convert(name, tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


JUNK: list[Any] = [None, True, 0, -1, 1.5, "", "x", [], {}, [None], [[]], {"a": 1}, 10**30, float("inf")]


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to every value inside a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*way, key)
        yield from places(inner, (*way, key))


@pytest.mark.parametrize("name", [name for name in NAMES if ".json" in catalogue()[name].annotations[0]])
def test_junk_in_any_place(name, tmp_path):
    """60 times one value of the annotations replaced: records and named problems, or one line about the file."""
    makers()[name](tmp_path)
    path = inputs_of(name, tmp_path).files[0]
    text = path.read_text()
    draw = random.Random(name)
    for _ in range(60):
        whole = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        *way, last = draw.choice(list(places(whole)))
        inner = whole
        for key in way:
            inner = inner[key]
        inner[last] = draw.choice(JUNK)
        lines = whole if path.suffix == ".jsonl" else [whole]
        path.write_text("\n".join(json.dumps(line) for line in lines))
        with contextlib.suppress(UserError):
            assert all((item.record is None) == bool(item.problem) for item in convert(name, tmp_path))
