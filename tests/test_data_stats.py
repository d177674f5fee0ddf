"""`llava-sv data stats`: its numbers beside the model's own splice and `llava-sv flops`, and its one-line mistakes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava_sv import cli
from llava_sv.bench.flops import main as flops
from llava_sv.bench.presets import FAMILIES
from llava_sv.conversation import get_template
from llava_sv.data.collator import DataCollatorForSupervisedDataset
from llava_sv.data.dataset import LazySupervisedDataset
from llava_sv.data.index import IndexWriter, open_records
from llava_sv.data.records import check_record
from llava_sv.model.builders import build_model
from llava_sv.model.token_groups import TokenRole
from tests.data.samples import text_only, with_image, write_array
from tests.tokenizers_util import llama_3_tokenizer
from tests.train.tiny import make_bases


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with images of many shapes, one of them turned, data.json and the cache of its index."""
    folder = tmp_path_factory.mktemp("stats")
    (folder / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in {"a": (40, 30), "b": (130, 60), "c": (30, 30), "d": (60, 130)}.items():
        more = {"exif": exif} if name == "d" else {}
        Image.new("RGB", size, (10, 200, 30)).save(folder / "images" / f"{name}.png", **more)
    values = [
        with_image(0),
        with_image(1, ["b.png", "c.png"], "<image><image>Which?", "Both."),
        text_only(2),
        with_image(3, "d.png", answer="A long answer, of many words."),
    ]
    write_array(folder / "data.json", values)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


def stats(data, *flags, file="data.json"):
    """The JSON report."""
    target = data / "report.json"
    words = ["data", "stats", str(data / file), "--cache-dir", str(data / "cache"), "--json", str(target), *flags]
    assert cli.main([str(word) for word in words]) == 0
    return json.loads(target.read_text())


CHECKPOINTS = {
    "llava": ("llava", {}, {"num_retained": 4, "num_skipped": 5}),
    "the last visual token passes": ("llava", {}, {"num_retained": 4, "num_skipped": 5, "last_visual_ffn": True}),
    "llava, dense": ("llava", {}, None),
    "llava_hd": ("llava_hd", {}, {"num_retained": 16, "num_skipped": 8}),
    "llava_hd, dense": ("llava_hd", {}, None),
    "cos": ("cos", {"mm_projector_type": "cos_80"}, {"num_retained": 16, "num_skipped": 8}),
}


def spliced(model, dataset, tokenizer):
    """(sequence lengths, rows through the FFN) of the model's own splice, a record at a time."""
    collate = DataCollatorForSupervisedDataset(tokenizer)
    lengths, rows = [], []
    for index in range(len(dataset)):
        batch = collate([dataset[index]])
        with torch.no_grad():
            found = model.prepare_inputs_labels_for_multimodal(
                batch["input_ids"], batch["attention_mask"], None, batch["images"], batch["image_sizes"]
            )
        lengths.append(int(found.attention_mask.sum()))
        through = (found.token_roles != TokenRole.SKIPPED) & (found.token_roles != TokenRole.PAD)
        rows.append(int(through.sum()))
    return lengths, rows


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoints_lengths_are_those_of_its_own_splice(data, bases, tmp_path, name):
    family, settings, skip = CHECKPOINTS[name]
    options = {"conv_template": "llama_3", **settings}
    tokenizer, model, processor = build_model(family, *map(str, bases), skip_vision=skip, **options)
    model.eval()
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    args = SimpleNamespace(image_folder=str(data / "images"), missing_images="error", is_multimodal=True)
    records = open_records(data / "data.json", data / "cache")
    dataset = LazySupervisedDataset(records, tokenizer, processor, args, get_template("llama_3"), model.config)
    lengths, rows = spliced(model, dataset, tokenizer)
    report = stats(data, "--checkpoint", tmp_path, "--image-folder", data / "images")
    side = "dense" if skip is None else "skipping"
    assert report["sequence"][side]["mean"] == sum(lengths) / len(lengths)
    assert (report["sequence"][side]["least"], report["sequence"][side]["most"]) == (min(lengths), max(lengths))
    if skip is None:
        assert "skipping" not in report["sequence"]
        assert "ffn" not in report["visual"]
        return
    assert report["sequence"]["skipping_through_ffn"]["mean"] == sum(rows) / len(rows)
    assert report["text_tokens"] + report["visual"]["skipping"]["tokens"] == sum(lengths)
    assert report["visual"]["unreadable_images"] == 0


@pytest.mark.parametrize(
    ("family", "preset"), [(family, preset) for family, presets in FAMILIES.items() for preset in presets]
)
def test_a_presets_tokens_are_those_of_flops(data, tmp_path, family, preset):
    words = ["--family", family, "--preset", preset]
    if FAMILIES[family][preset].num_retained is None:
        words += ["--num-retained", "40", "--num-skipped", "20"]
    target = tmp_path / "flops.json"
    assert flops([*words, "--text-tokens", "0", "--json", str(target)]) == 0
    counted = json.loads(target.read_text())
    visual = stats(data, *words)["visual"]
    assert visual["dense"]["per_image"]["mean"] == counted["dense"]["visual_tokens"]
    assert visual["skipping"]["per_image"]["mean"] == counted["skip"]["visual_tokens"]
    assert visual["ffn"]["per_image"]["mean"] == counted["skip"]["ffn_rows"]
    assert visual["dense"]["tokens"] == 4 * counted["dense"]["visual_tokens"]


def test_text_by_hand(data, tmp_path, capsys):
    llama_3_tokenizer().save_pretrained(tmp_path)
    report = stats(data, "--tokenizer", tmp_path, "--template", "plain")
    names = ("records", "with_image", "text_only", "several_images", "images", "exchanges")
    assert [report[name] for name in names] == [4, 3, 1, 1, 4, 4]
    texts = ["<image>\nWhat is it?A square.", "<image><image>Which?Both.", "How many?Two."]
    texts.append("<image>\nWhat is it?A long answer, of many words.")
    assert report["characters"] == sum(map(len, texts))
    assert report["characters_per_record"]["most"] == max(map(len, texts))
    tokenizer = llama_3_tokenizer()
    answers = ("A square.\n", "Both.\n", "Two.\n", "A long answer, of many words.\n")
    said = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers]
    assert report["supervised_tokens"] == sum(said)
    assert report["text_tokens"] == sum(said) + 4  # a BOS each: plain drops the question
    out = capsys.readouterr().out
    assert "several_images" in out
    assert "task group" not in out, "there is but one, without a name"


def test_the_page_says_groups_tokens_and_batches(data, tmp_path, capsys):
    """Of a mixture's folder, as `data mix` writes it."""
    with IndexWriter(tmp_path / "index.arrow") as writer:
        for record in open_records(data / "data.json", data / "cache"):
            value = {"id": record.id, "image": list(record.images), "conversations": list(record.turns)}
            writer.add(check_record(value, "here"), source="home" if record.images else "", line=1)
    llama_3_tokenizer().save_pretrained(tmp_path / "llm")
    flags = ["--tokenizer", tmp_path / "llm", "--template", "plain", "--family", "llava", "--plots", tmp_path / "plots"]
    report = stats(data, *flags, file=tmp_path)
    assert {name: group["records"] for name, group in report["groups"].items()} == {
        "(not in the catalogue)": 3,
        "(no source)": 1,
    }
    out = capsys.readouterr().out
    for line in (
        "  home                        3  75.0%           3       4          3",
        "  dense                         576 an image               2,304 in all",
        "  with skipping                 258 an image               1,032 in all",
        "batches of 16, sequences up to 2,048 (forecast from 4 records)",
        f"plot: {tmp_path}/plots/lengths.png",
    ):
        assert line in out, out
    assert all((tmp_path / "plots" / name).is_file() for name in ("groups.png", "sources.png", "records.png"))


def test_hd_without_pictures_says_so(data, bases, tmp_path, capsys):
    _, model, _ = build_model("llava_hd", *map(str, bases), conv_template="llama_3")
    model.config.save_pretrained(tmp_path)
    report = stats(data, "--checkpoint", tmp_path)
    most = model.config.dense_tokens_per_image(None)
    assert report["visual"]["dense"]["per_image"] == {
        "mean": most,
        "least": most,
        "median": most,
        "95%": most,
        "most": most,
    }
    assert "count as those with most tokens: give --image-folder" in capsys.readouterr().out
    assert "sequence" not in report, "there is no tokenizer in this folder"


def test_hd_reads_the_sizes_of_pictures_in_shards(data, bases, tmp_path, capsys):
    _, model, _ = build_model("llava_hd", *map(str, bases), conv_template="llama_3")
    model.config.save_pretrained(tmp_path / "model")
    words = ["data", "shard", data / "data.json", "--image-folder", data / "images", "--output", tmp_path / "shards"]
    assert cli.main([str(word) for word in words]) == 0
    plain = stats(data, "--checkpoint", tmp_path / "model", "--image-folder", data / "images")
    packed = stats(data, "--checkpoint", tmp_path / "model", file=tmp_path / "shards")
    assert packed["visual"] == plain["visual"]
    assert "note" not in packed["visual"]
    assert packed["visual"]["dense"]["per_image"]["least"] < packed["visual"]["dense"]["per_image"]["most"]


def test_a_dense_checkpoint_with_a_budget_to_try(data, bases, tmp_path):
    _, model, _ = build_model("llava", *map(str, bases), conv_template="llama_3")
    model.config.save_pretrained(tmp_path)
    report = stats(data, "--checkpoint", tmp_path, "--num-retained", "3", "--num-skipped", "4")
    assert report["visual"]["dense"]["per_image"]["mean"] == 16
    assert report["visual"]["skipping"]["per_image"]["mean"] == 3 + 4 + 2
    assert report["visual"]["ffn"]["per_image"]["mean"] == 3 + 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokenizer", "x"], "--tokenizer and --template go together"),
        (["--template", "plain"], "--tokenizer and --template go together"),
        (["--tokenizer", "x", "--template", "nine"], "unknown conversation template 'nine'; known: plain, v1"),
        (["--tokenizer", "{data}/nowhere", "--template", "plain"], "/nowhere: cannot be loaded"),
        (["--checkpoint", "nowhere"], "--checkpoint nowhere: no readable config.json there"),
        (["--checkpoint", "x", "--family", "llava"], "--family does not go with --checkpoint"),
        (["--checkpoint", "x", "--preset", "2x2"], "--preset does not go with --checkpoint"),
        (["--checkpoint", "x", "--dense-tokens", "9"], "--dense-tokens does not go with --checkpoint"),
        (["--num-retained", "9"], "--num-retained needs --family (llava, llava_hd, cos) or --checkpoint"),
        (["--family", "lava"], "--family: unknown family 'lava'; known: llava, llava_hd, cos"),
        (["--family", "llava", "--preset", "x"], "--preset: unknown preset 'x' of family 'llava'"),
        (["--family", "cos", "--preset", "cos_336"], "--num-retained and --num-skipped are needed here"),
        (["--family", "llava", "--num-retained", "0"], "--num-retained 0: expected 1 or more"),
        (["--family", "llava", "--num-skipped", "-1"], "--num-skipped -1: expected 0 or more"),
        (["--family", "llava", "--num-retained", "500"], "500 + --num-skipped 156 is more than the 576 dense tokens"),
        (["--model-max-length", "0"], "--model-max-length 0: expected 1 or more"),
        (["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
        (["--image-folder", "nowhere"], "no such image folder: nowhere"),
        (["--plots", "{data}/data.json"], "is a file; name a folder"),
        (["--plots", "/proc/nowhere"], "--plots /proc/nowhere: cannot be written ("),
        (["--json", "/proc/nowhere/x.json"], "--json /proc/nowhere/x.json: cannot be written ("),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(data, words, message, capsys):
    words = [word.format(data=data) for word in words]
    assert cli.main(["data", "stats", str(data / "data.json"), "--cache-dir", str(data / "cache"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_such_data(capsys):
    assert cli.main(["data", "stats", "nowhere.json"]) == 2
    assert "no such data file: nowhere.json" in capsys.readouterr().err


def test_help_ends_with_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "stats", "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("  llava-sv data stats ")


def test_data_of_text_alone(data, tmp_path):
    write_array(data / "text.json", [text_only(0), text_only(1)])
    llama_3_tokenizer().save_pretrained(tmp_path)
    flags = ["--tokenizer", tmp_path, "--template", "plain", "--family", "llava", "--plots", tmp_path / "plots"]
    report = stats(data, *flags, file="text.json")
    assert report["visual"]["dense"] == {"tokens": 0, "per_image": None}
    assert report["sequence"]["dense"] == report["sequence"]["skipping"]
    assert [path.rsplit("/")[-1] for path in report["plots"]] == ["records.png", "lengths.png"]
