"""Converters of formats of their own, piece by piece: reading order, MATLAB files, lettered options, options of the
sources."""

from __future__ import annotations

import base64
import json
import shutil
import zlib

import pytest

from llava_sv.data.converters.arxivqa import label_of, options_of
from llava_sv.data.converters.matlab import read_texts
from llava_sv.data.converters.ocr import in_reading_order
from llava_sv.data.converters.plotqa import spaced
from llava_sv.errors import UserError
from tests.data.converting import convert, record
from tests.data.test_converters_math_ocr_science import LETTER, SHORT, UNSURE
from tests.data.trees import makers
from tests.data.trees.files import save_json, save_jsonl
from tests.data.trees.scene_text import GT_MAT

PLAIN_MAT = (
    "c-rk$!A`<J5ZzitCB~>Rp5GA@gti9M#)IHNiC|3R-Yl?aP3e+$1^&ig@Z=BhWA2igR$>I?;K5GvGMVkZH`ABwG^?#fwT5!hK(pF9?ztYry+=il2Ynj@"
    "9=hWKt^!5{>w^0>9;m<_AHp(WmhBVEw#u*!t3rMeTD`d=(_4m+tjwG0DEhRXsP!nTJDn#Q)M|t%-dKxy*#vJ}Vof3w)g+<2C2^^dG**n%|J48g?*B4"
    "-Ys7<Yy0_AIllq_f|JVLQTWoJ_NVt8U_E|XP-H@1<`G&Wj(A$mbvr?OS9utmfR2-xDJa~-fSXs|pPH%5UPt}%TlmveX9LqUBjpe3#`GtJai5QFN{lO3"
    "Y)!l=c{udIBk>|Ru@A=GQA#yfo4t^b703N`B5D-8PxCIz61YE#}iqAQXIsdJH>8lg&v$=k$cbJ=*_fX;*0VePH$tz_?YAUo*K!=bIwf0i3"
)
"""What scipy wrote, not deflated: the same variables as in GT_MAT."""


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


@pytest.mark.parametrize("given", [GT_MAT, PLAIN_MAT], ids=["deflated", "plain"])
def test_matlab_texts_are_those_that_scipy_wrote(given, tmp_path):
    path = tmp_path / "gt.mat"
    path.write_bytes(unpacked(given))
    found = {name: list(texts) for name, texts in read_texts(path, ("imnames", "txt")).items()}
    assert found == {
        "imnames": [["8/ballet_106_0.jpg"], ["8/ballet_106_1.jpg"], ["200/tour_2_97.jpg"]],
        "txt": [["Lines:\nI lost\nKevin", "will", "line\nand"], ["one"], ["Größe", "  (a)\n b,c"]],
    }


def test_matlab_files_of_another_kind(tmp_path):
    path = tmp_path / "gt.mat"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500))
    with pytest.raises(UserError, match="cannot be read as a MATLAB 5 file"):
        read_texts(path, ("imnames",))
    path.write_bytes(unpacked(GT_MAT))
    with pytest.raises(UserError, match="has no 'names'; is it the right file"):
        read_texts(path, ("names", "txt"))
    with pytest.raises(UserError, match="a cell holds no text"):
        list(read_texts(path, ("wordBB",))["wordBB"])


def test_synthtext_says_which_entry_has_no_text(tmp_path, monkeypatch):
    makers()["synthtext"](tmp_path)
    found = {"imnames": [["a.jpg"], ["b.jpg"]], "txt": [["one"], [" \n "]]}
    monkeypatch.setattr("llava_sv.data.converters.synthtext.read_texts", lambda path, names: found)
    good, bad = convert("synthtext", tmp_path)
    assert good.record["image"] == "SynthText/a.jpg"
    assert (bad.where, bad.problem) == (f"{tmp_path / 'SynthText/gt.mat'} entry 1", "has no text")
    found["imnames"].append(["c.jpg"])
    with pytest.raises(UserError, match="pictures without texts, or texts without pictures, from entry 2 on"):
        convert("synthtext", tmp_path)


def test_reading_order():
    """Two columns of a sign, a line a little aslant, and a tall box beside two lines."""
    boxes = [("b", (50, 12, 90, 22)), ("c", (10, 30, 40, 40)), ("a", (10, 10, 40, 20)), ("d", (50, 27, 90, 37))]
    assert in_reading_order(boxes) == ["a", "b", "c", "d"]
    assert in_reading_order(boxes, words=True) == ["a b", "c d"]
    assert in_reading_order([("low", (0, 9, 5, 19)), ("high", (50, 0, 60, 10))], words=True) == ["high", "low"]
    assert in_reading_order([]) == []


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["A) one", "B) two"], ["one", "two"]),
        (["A. one", "B: two"], ["one", "two"]),
        (["(A) one", "-", "(B) two", ""], ["one", "two"]),
        (["- A) one", "- B) two"], ["one", "two"]),
        (["A", "B", "C"], ["A", "B", "C"]),
        (["A lot", "Bits"], ["A lot", "Bits"]),
        (["B) one", "A) two"], ["B) one", "A) two"]),
    ],
)
def test_options_lose_their_own_letters(options, texts):
    assert options_of(options) == texts


@pytest.mark.parametrize(
    ("label", "index"),
    [("B", 1), ("B) two", 1), ("two", 1), ("(A)", 0), ("A.", 0), ("B. twofold", 1), ("[B]", 1), ("The answer is B", 1)],
)
def test_label_is_read_by_letter_or_words(label, index):
    assert label_of(label, ["A) one", "B) two"], ["one", "two"]) == index


@pytest.mark.parametrize(("label", "index"), [("C", 1), ("B", 0), ("(D)", 2), ("C) two", 1)])
def test_options_lettered_in_another_way_are_meant_by_their_letters(label, index):
    options = ["B) one", "C) two", "D) three"]
    assert label_of(label, options, options_of(options)) == index


@pytest.mark.parametrize(
    ("label", "options"), [("A", ["B) one", "C) two"]), ("B", ["A) one", "B) two", "B) three"]), ("C", ["one", "two"])]
)
def test_a_letter_that_means_none_or_two_is_refused(label, options):
    with pytest.raises(ValueError, match=f"label '{label}' is none of the"):
        label_of(label, options, options_of(options))


def test_arxivqa_entries_without_a_choice(tmp_path):
    makers()["arxivqa"](tmp_path)
    path = tmp_path / "ArxivQA/arxivqa.jsonl"
    entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    entries[0]["label"] = "E"
    entries[1]["options"] = ["Only one", "-"]
    del entries[2]["image"]
    save_jsonl(path, entries)
    items = convert("arxivqa", tmp_path)
    assert [(item.where, item.problem) for item in items] == [
        (f"{path} line 1", "label 'E' is none of the 4 options"),
        (f"{path} line 2", "1 options are no choice"),
        (f"{path} line 3", "has no field 'image'"),
        (f"{path} line 4", ""),
    ]


def test_squad_2_says_what_to_answer_where_nothing_answers(tmp_path):
    questions = [
        {"id": "1", "question": "Who?", "answers": [], "plausible_answers": [{"text": "Ada"}], "is_impossible": True},
        {"id": "2", "question": "When?", "answers": [{"text": "1843", "answer_start": 3}], "is_impossible": False},
    ]
    paragraphs = [{"context": "In 1843 it was printed.", "qas": questions}]
    whole = {"version": "v2.0", "data": [{"title": "Notes", "paragraphs": paragraphs}, {"title": "Nothing"}]}
    path = save_json(tmp_path / "squad/train-v1.1.json", whole)
    good, bad = convert("squad", tmp_path)
    asked = f"In 1843 it was printed.\n\nWho?\n{UNSURE}\n{SHORT}"
    assert good.record == record("squad/train-v1.1/0/0", None, asked, "Unanswerable", "When?", "1843")
    assert (bad.where, bad.problem) == (f"{path} line 1: data[1]", "has no list 'paragraphs'")


def test_scienceqa_takes_the_wanted_splits(tmp_path):
    makers()["scienceqa"](tmp_path)
    items = convert("scienceqa", tmp_path, splits=["train"], pictures_only=False)
    assert [item.record["id"] for item in items] == ["scienceqa/1", "scienceqa/4"]
    asked = f"Is it a sentence?\nA. yes\nB. no\n{LETTER}"
    assert items[1].record == record("scienceqa/4", None, asked, "A")


def test_tabmwp_with_final_answers(tmp_path):
    makers()["tabmwp"](tmp_path)
    item = convert("tabmwp", tmp_path, answer="answer")[1]
    asked = f"<image>\nIs the price a function of the item?\nOptions: yes, no\n{SHORT}"
    assert item.record == record("tabmwp/3", "tabmwp/tables/3.png", asked, "yes")


def test_tqa_with_questions_about_the_text(tmp_path):
    makers()["tqa"](tmp_path)
    items = convert("tqa", tmp_path, text_questions=True)
    assert len(items) == 4
    asked = f"Is it old?\nA. true\nB. false\n{LETTER}"
    assert items[2].record == record("tqa/NDQ_000001", None, asked, "A")


def test_ai2d_without_pictures_with_letters(tmp_path):
    """Questions about letters can't be asked of the plain picture; tests' pictures stay out, but for a list of them."""
    makers()["ai2d"](tmp_path)
    shutil.rmtree(tmp_path / "ai2d/abc_images")
    assert [item.record["id"] for item in convert("ai2d", tmp_path)] == ["ai2d/0.png", "ai2d/10.png"]
    (tmp_path / "ai2d/ai2d_test_ids.csv").unlink()
    assert [item.record["id"] for item in convert("ai2d", tmp_path)] == ["ai2d/0.png", "ai2d/10.png", "ai2d/99.png"]


def test_ai2d_damaged_picture_is_named_once(tmp_path):
    makers()["ai2d"](tmp_path)
    path = tmp_path / "ai2d/questions/0.png.json"
    whole = json.loads(path.read_text("utf-8"))
    whole["questions"]["What eats grass?"]["correctAnswer"] = 4
    save_json(path, whole)
    bad, good = convert("ai2d", tmp_path)
    assert (bad.where, bad.problem) == (str(path), "answer 4 of 4 options")
    assert good.record["id"] == "ai2d/10.png"


def test_plotqa_loses_the_damaged_questions_alone(tmp_path):
    makers()["plotqa"](tmp_path)
    path = tmp_path / "PlotQA/train/qa_pairs_V1.json"
    pairs = json.loads(path.read_text("utf-8"))["qa_pairs"]
    pairs[1]["answer"] = None
    del pairs[3]["image_index"]
    save_json(path, {"qa_pairs": pairs})
    items = convert("plotqa", tmp_path)
    assert [(item.where, item.problem) for item in items if item.record is None] == [
        (f"{path} line 1: qa_pairs[1]", "has no 'answer'"),
        (f"{path} line 1: qa_pairs[3]", "has no 'image_index'"),
    ]
    records = [item.record for item in items if item.record is not None]
    assert [one["id"] for one in records] == ["plotqa/0", "plotqa/2"]
    assert len(records[0]["conversations"]) == 4


def test_plotqa_takes_so_many_questions(tmp_path):
    makers()["plotqa"](tmp_path)
    last = convert("plotqa", tmp_path)[-1].record["conversations"]
    assert len(last) == 2 * 20
    assert [turn["value"] for turn in last[2:6]] == ["Question 1?", "0.1", "Question 2?", "0.2"]
    assert last[-2]["value"] == "Question 23?"
    assert len(convert("plotqa", tmp_path, most=3)[-1].record["conversations"]) == 6
    assert spaced(list(range(10)), 4) == [0, 2, 5, 7]
    assert spaced([1, 2], 4) == [1, 2]


def test_lsvt_picture_that_is_nowhere(tmp_path):
    """It is then looked for, and missed, in the first folder."""
    makers()["icdar19-lsvt"](tmp_path)
    (tmp_path / "LSVT/train_full_images_1/gt_15000.jpg").unlink()
    item = convert("icdar19-lsvt", tmp_path)[1]
    assert item.record["image"] == "LSVT/train_full_images_0/gt_15000.jpg"


def test_coco_text_of_other_parts(tmp_path):
    makers()["coco-text"](tmp_path)
    items = convert("coco-text", tmp_path, sets=["val"])
    assert [item.record["conversations"][1]["value"] for item in items] == ["EXIT"]


def test_squad_paragraphs_printed_to_pictures(tmp_path):
    makers()["squad"](tmp_path)
    path = tmp_path / "squad/train-v1.1.json"
    whole = json.loads(path.read_text("utf-8"))
    whole["data"][1]["paragraphs"][0]["page"] = "b/1.png"
    save_json(path, whole)
    bad, good, _ = convert("squad", tmp_path, image="page")
    assert bad.problem == "has no field 'page'"
    assert good.record == record("squad/train-v1.1/1/0", "b/1.png", f"<image>\nWhen?\n{SHORT}", "late 1990s")
