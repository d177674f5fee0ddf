"""Samples of the sources of `sources/ocr.yaml`."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import Any

from tests.data.trees.files import save_json, save_picture
from tests.data.trees.layouts import pixels, save_parquet
from tests.data.trees.math import said

GT_MAT = (
    "c-r%I4DoSvQZUssQ1EpO(M`+DNmU5QNi0drFUqx2D9A6)tk6+#E=o--Nlj76&$ChpPApOI%P&(fGE^`$wK6ucGBQ;#GB7e@AOkRZ`tk!Qe;}@y"
    "^Ef#n;l_bO2M(|;v22(zk&!84;*T={QcKh<l{cO^+1c30e_~yN%Zp^^OUIdy_&A(ldTOjN^EBrXK7(@_3er7o{|_`>{2(8}z_2@sO^C3u%WU>*93{"
    "nA=Oi`*kg@4-V*?UW5)zm%$vE(&G%;!m&6o7r%v_k37nhWmWymZ);qAeO3&)#W=L<}#WD3~VS{Ib$=a=QVXJKRHp2oN^M=O_kTF)dWrOi{ARjIIV"
    "Vq;^SXI*CCp1?gzEe~0+G3;v*vjSPS0Bl`tpCQ*F2LV_2#Y)jE+#BnbHnncOvHFGTqP&e8a*nWkHM@6+`$^I{HWfuzHaTPF`e*+`T&6Kk?EJQJQF"
    "83#YxAzyPW%+>wd!-M)ZZ10`)^ggKJRl=^ZE4hbFA`fwzH;rr*XLFHMGlcX&gMjsbh1{Q6cP)aILxRKHqcu^OY($e7(EydESZ{e)n28J$L*X8#e#U"
    "x+E>VH9NchFuZS)DgXd5EZM&<"
)
"""What scipy wrote: charBB, wordBB, imnames and txt of three pictures, deflated as MATLAB does, in base 85."""


def box(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    """A rectangle's corners, clockwise."""
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


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
    paragraphs = [
        {
            "image": "train/1_1.png",
            "context": "The abbey was founded in 1132.",
            "qas": [
                {"id": "h1", "question": "When was it founded?", "answers": [{"text": "1132", "answer_start": 25}]},
                {"id": "h2", "question": "What was founded? ", "answers": [{"text": "The abbey", "answer_start": 0}]},
            ],
        },
        {
            "image": "train/1_2.png",
            "context": "It has two towers.",
            "qas": [{"id": "h3", "question": "How many towers?", "answers": [{"text": "two", "answer_start": 7}]}],
        },
    ]
    save_json(root / "hw-squad/HW-SQuAD_train_1.0.json", {"data": [{"title": "Abbey", "paragraphs": paragraphs}]})
    for paragraph in paragraphs:
        save_picture(root / "hw-squad/images" / str(paragraph["image"]))
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
    rows = [
        {
            "image": pixels(f"{name}.jpg"),
            "filename": f"train_images/{name}.jpg",
            "caption_image": f"A sign, {name}.",
            "caption_text": "OPEN",
            "caption_condensed": f"A sign says 'OPEN'. It is {name}.",
        }
        for name in ("0a1b", "0a2c", "0a3d")
    ]
    save_parquet(root / "textocr-gpt4v/data/train-00000-of-00001.parquet", rows)
    return 3


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


def uber_text(root: Path) -> int:
    """The second picture has nothing legible."""
    folder = root / "ubertext/train/1Kx1K"
    texts = {
        "0001": "90 10 160 10 160 30 90 30\tSTREET\tStreetName\n10 11 80 11 80 31 10 31\tMAIN\tStreetName\n"
        "10 60 50 60 50 90 45 95 10 90\t12 - 14\tStreetNumberRange\n10 100 50 100 50 120 10 120\t***\tNone\n",
        "0002": "1 1 9 1 9 9 1 9\t*\tNone\n",
        "0003": "1 1 9 1 9 9 1 9\tCafé\tBusinessName\n\n",
    }
    for number, text in texts.items():
        path = save_picture(folder / f"img_{number}.jpg").with_name(f"truth_img_{number}.txt")
        path.write_text(text, encoding="utf-8")
    return 2


def ocr_vqa(root: Path) -> int:
    """The third book is of the test."""

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
        "0061565644": book(1, "How to Eat", {"What is the title of this book?": 'How to "Eat"'}),
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
    for entry in entries:
        save_picture(root / f"rico/combined/{entry['image_id']}.jpg")
    return 3


def synthtext(root: Path) -> int:
    for name in ("8/ballet_106_0.jpg", "8/ballet_106_1.jpg", "200/tour_2_97.jpg"):
        save_picture(root / "SynthText" / name)
    (root / "SynthText/gt.mat").write_bytes(zlib.decompress(base64.b85decode(GT_MAT)))
    return 3


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
    return 2


def lsvt(root: Path) -> int:
    """The third picture has nothing legible; the pictures lie in two folders."""

    def text(written: str, corners: list[list[int]], illegible: bool = False) -> dict[str, Any]:
        return {"transcription": written, "points": corners, "illegibility": illegible}

    labels = {
        "gt_0": [
            text("鲜花", box(10, 50, 90, 80)),
            text("本店", box(10, 5, 90, 40)),
            text("###", box(1, 1, 5, 5), True),
        ],
        "gt_15000": [text("7-ELEVEN", box(0, 0, 50, 10))],
        "gt_3": [text("###", box(0, 0, 9, 9), True)],
    }
    save_json(root / "LSVT/train_full_labels.json", labels)
    for name in ("train_full_images_0/gt_0", "train_full_images_1/gt_15000", "train_full_images_0/gt_3"):
        save_picture(root / f"LSVT/{name}.jpg")
    return 2


def mtwi(root: Path) -> int:
    """Texts hold commas; the file names end in `.jpg.jpg` and `.jpg.txt`."""
    texts = {
        "TB1..FLLXXXXXbCXpXXunYpLFXX": "10,10,90,10,90,30,10,30,sale, now\n10.5,40,90,40,90,60,10,60,包邮\n"
        "1,70,9,70,9,80,1,80,###\n",
        "T1z_2": "\ufeff10,10,90,10,90,30,10,30,100%\n",
    }
    for name, text in texts.items():
        save_picture(root / f"MTWI/image_train/{name}.jpg.jpg")
        path = root / f"MTWI/txt_train/{name}.jpg.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 2


def art(root: Path) -> int:
    curved = [[10, 30], [50, 10], [90, 30], [88, 44], [50, 24], [12, 44]]
    labels = {
        "gt_0": [
            {"transcription": "COFFEE", "points": curved, "language": "Latin", "illegibility": False},
            {"transcription": "since 1990", "points": box(20, 60, 80, 70), "language": "Latin", "illegibility": False},
        ],
        "gt_1": [
            {"transcription": "###", "points": box(0, 0, 9, 9), "language": "Latin", "illegibility": True},
            {"transcription": "茶", "points": box(1, 20, 9, 30), "language": "Chinese", "illegibility": False},
        ],
    }
    save_json(root / "ArT/train_labels.json", labels)
    for name in labels:
        save_picture(root / f"ArT/train_images/{name}.jpg")
    return 2


def coco_text(root: Path) -> int:
    """Four pictures: words side by side; none legible; of the validation part; without words."""

    def word(number: int, image: int, text: str, corner: tuple[int, int], legible: bool = True) -> dict[str, Any]:
        left, top = corner
        given: dict[str, Any] = {
            "mask": [left, top, left + 40, top, left + 40, top + 10, left, top + 10],
            "class": "machine printed",
            "bbox": [left, top, 40, 10],
            "image_id": image,
            "id": number,
            "language": "english",
            "area": 400.0,
            "legibility": "legible" if legible else "illegible",
        }
        return given | {"utf8_string": text} if legible else given

    words = [
        word(45, 217925, "WAY", (60, 12)),
        word(46, 217925, "ONE", (10, 10)),
        word(47, 217925, "2nd", (10, 40)),
        word(48, 217925, "", (10, 80), legible=False),
        word(49, 300, "", (1, 1), legible=False),
        word(50, 400, "EXIT", (1, 1)),
    ]
    sets = {217925: "train", 300: "train", 400: "val", 500: "train"}
    images = {
        str(number): {
            "id": number,
            "set": part,
            "width": 640,
            "height": 427,
            "file_name": f"COCO_train2014_{number:012d}.jpg",
        }
        for number, part in sets.items()
    }
    whole = {
        "cats": {},
        "anns": {str(one["id"]): one for one in words},
        "imgs": images,
        "imgToAnns": {str(number): [one["id"] for one in words if one["image_id"] == number] for number in sets},
        "info": {"version": "2.0"},
    }
    save_json(root / "cocotext/cocotext.v2.json", whole)
    for image in images.values():
        save_picture(root / f"coco/train2014/{image['file_name']}")
    return 1


def docscan(root: Path) -> int:
    question = "Convert the page to text."
    asked = [("a/1.jpg", question, "Dear Sir,\n\nyours"), ("2.jpg", question, "Invoice 7"), ("3.jpg", question, "§ 1")]
    return _conversations(root / "docscan", asked)


def hiertext(root: Path) -> int:
    """The second picture has nothing legible."""

    def line(text: str, legible: bool = True) -> dict[str, Any]:
        common = {"vertices": box(0, 0, 9, 9), "legible": legible, "handwritten": False, "vertical": False}
        return common | {"text": text, "words": [common | {"text": word} for word in text.split()]}

    def page(name: str, paragraphs: list[list[dict[str, Any]]]) -> dict[str, Any]:
        made = [{"vertices": box(0, 0, 9, 9), "legible": True, "lines": lines} for lines in paragraphs]
        return {"image_id": name, "image_width": 1024, "image_height": 683, "paragraphs": made}

    pages = [
        page("a1", [[line("BUS STOP"), line("", legible=False)], [line("Line 7"), line("to Köln ")]]),
        page("b2", [[line("", legible=False)]]),
        page("c3", [[line("Exit")]]),
    ]
    info = {"date": "release", "version": "v1.0"}
    save_json(root / "hiertext/gt/train.jsonl", {"info": info, "annotations": pages})
    for given in pages:
        save_picture(root / f"hiertext/train/{given['image_id']}.jpg")
    return 2


MAKERS = {
    "tqa": tqa,
    "hw-squad": hw_squad,
    "textvqa": textvqa,
    "st-vqa": st_vqa,
    "textocr-gpt4v": textocr_gpt4v,
    "ocrbench-kv": ocrbench_kv,
    "uber-text": uber_text,
    "ocr-vqa": ocr_vqa,
    "screenqa": screenqa,
    "synthtext": synthtext,
    "chrome-writing": chrome_writing,
    "k12-printing": k12_printing,
    "squad": squad,
    "icdar19-lsvt": lsvt,
    "icpr18-mtwi": mtwi,
    "icdar19-art": art,
    "coco-text": coco_text,
    "docscan": docscan,
    "hiertext": hiertext,
}
