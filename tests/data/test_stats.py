"""What `data.stats` counts, beside plain loops over the records and numbers worked out by hand."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from llava_sv.data import stats, stats_plots
from llava_sv.data.index import open_index
from llava_sv.data.sources import Source
from tests.data.samples import exchange, write_images


def source(name, group):
    return Source(name, group, name, "home", "licence", ("a.json",), "converter")


@pytest.fixture
def catalogue(monkeypatch):
    known = {name: source(name, group) for name, group in (("doc", "ocr"), ("chart", "ocr"), ("alpaca", "language"))}
    monkeypatch.setattr(stats, "catalogue", lambda: known)


SIZES = {"a": (30, 20), "b": (64, 64), "c": (100, 40)}
VALUES = [
    ("doc", ["a.png"], 2),
    ("alpaca", [], 1),
    ("doc", ["b.png", "c.png"], 1),
    ("chart", ["c.png"], 3),
    ("my own", ["gone.png"], 1),
    (None, [], 4),
    ("doc", ["a.png"], 1),
]


@pytest.fixture
def records(tmp_path):
    write_images(tmp_path / "images", **SIZES)
    values = []
    for number, (name, images, exchanges) in enumerate(VALUES):
        first = exchange("<image>" * len(images) + "What?", "x" * number)
        value = {"id": str(number), "conversations": first + exchange("And?", "This.") * (exchanges - 1)}
        value |= {"image": images} if images else {}
        values.append(value | ({"source": name} if name else {}))
    path = tmp_path / "data.json"
    path.write_text(json.dumps(values))
    return open_index(path, tmp_path / "cache")


def of_size(size):
    """A token for each ten pixels of width, twice that where dense, a half through the FFN; 99 for the largest."""
    kept = 99 if size is None else size[0] // 10
    return stats.ImageTokens(2 * kept, kept, kept // 2)


BY_SIZE = stats.Visual("tens", of_size, by_size=True)


def test_groups_stand_in_the_catalogues_order(catalogue):
    groups, of_source = stats.groups_of(["", "alpaca", "chart", "doc", "my own"])
    assert groups == ["ocr", "language", stats.UNLISTED, stats.NO_SOURCE]
    assert [groups[at] for at in of_source] == [stats.NO_SOURCE, "language", "ocr", "ocr", stats.UNLISTED]
    assert stats.groups_of(["chart"])[0] == ["ocr"]


def test_every_group_and_source_adds_up(records, catalogue, tmp_path):
    found = stats.measure(records, visual=BY_SIZE, image_folder=tmp_path / "images")
    report = stats.report(records, found, BY_SIZE, longest=100, batch=2)
    group_of = {"doc": "ocr", "chart": "ocr", "alpaca": "language", "my own": stats.UNLISTED, None: stats.NO_SOURCE}
    for name, group in group_of.items():
        mine = [(images, exchanges) for said, images, exchanges in VALUES if said == name]
        values = report["groups"][group]["sources"][name or stats.NO_SOURCE]
        assert values["records"] == len(mine)
        assert values["share"] == len(mine) / len(VALUES)
        assert values["with_image"] == sum(bool(images) for images, _ in mine)
        assert values["images"] == sum(len(images) for images, _ in mine)
        assert values["exchanges"] == sum(exchanges for _, exchanges in mine)
    assert len([name for group in report["groups"].values() for name in group["sources"]]) == len(group_of)
    for what in ("records", "with_image", "images", "exchanges", "characters"):
        whole = sum(values[what] for values in report["groups"].values())
        assert whole == report[what]
        for values in report["groups"].values():
            assert values[what] == sum(one[what] for one in values["sources"].values())
    assert report["characters"] == sum(len(turn["value"]) for record in records for turn in record.turns)
    assert (report["text_only"], report["several_images"]) == (2, 1)
    assert "sequence" not in report
    assert "text_tokens" not in report


def test_images_of_many_sizes(records, catalogue, tmp_path):
    found = stats.measure(records, visual=BY_SIZE, image_folder=tmp_path / "images")
    each = {f"{name}.png": of_size(size) for name, size in SIZES.items()} | {"gone.png": of_size(None)}
    flat = [each[name] for record in records for name in record.images]
    for what in ("dense", "skipping", "ffn"):
        assert found.images[what].tolist() == [getattr(tokens, what) for tokens in flat]
        whole = [sum(getattr(each[name], what) for name in record.images) for record in records]
        assert found.records[f"visual_{what}"].tolist() == whole
    values = stats.report(records, found, BY_SIZE, 100, 2)["visual"]
    assert values["unreadable_images"] == found.unreadable == 1
    assert values["dense"]["tokens"] == 2 * values["skipping"]["tokens"] == sum(tokens.dense for tokens in flat)
    assert values["dense"]["per_image"]["most"] == 198


def test_without_a_folder_all_are_the_largest(records, catalogue):
    found = stats.measure(records, visual=BY_SIZE)
    assert set(found.images["skipping"].tolist()) == {99}
    assert len(found.images["skipping"]) == 6


def test_turned_pictures_are_counted_upright(records, catalogue, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZES["c"]).save(tmp_path / "images" / "c.png", exif=exif)
    found = stats.measure(records, visual=BY_SIZE, image_folder=tmp_path / "images")
    assert found.images["skipping"].tolist() == [3, 6, 4, 4, 99, 3]


def test_spread_by_hand():
    values = stats.spread(np.array([4, 1, 1, 2, 7]))
    assert values == {"mean": 3.0, "least": 1, "median": 2, "95%": pytest.approx(6.4), "most": 7}


def test_padding_by_hand():
    """[3 1] [2 2] [5]: two of 6 + 4 + 5 positions are padding."""
    assert stats.padding(np.array([3, 1, 2, 2, 5]), 2) == pytest.approx(2 / 15)
    assert stats.padding(np.array([4, 4, 4]), 2) == 0
    assert stats.padding(np.array([1, 9]), 1) == 0


def test_a_forecast_by_hand():
    """Texts of 4 and pairs of 8 in rows of 10, and one of 30, which is cut."""
    lengths = np.array([4, 8] * 20 + [30])
    images = np.array([0, 1] * 20 + [1])
    columns = stats.Columns({"images": images, "sequence_dense": lengths}, group=np.zeros(41, int))
    values = stats.forecast(columns, ("dense",), longest=10, batch=4)
    assert (values["records_sampled"], values["dense"]["sequences_cut"]) == (41, 1)
    # modalities apart: all batches are of one length, but for the one with the sequence that is cut
    assert values["dense"]["padding_grouped"] == pytest.approx(6 / (20 * 4 + 20 * 8 + 10 + 6))
    # two texts a row of 10; each of the others alone
    packs = 10 + 21
    assert values["dense"]["records_per_pack"] == pytest.approx(41 / packs)
    assert values["dense"]["padding_packed"] == pytest.approx(1 - (80 + 160 + 10) / (packs * 10))
    assert values["dense"]["padding_in_random_order"] > 0.2


def test_a_forecast_of_many_looks_at_some(monkeypatch):
    monkeypatch.setattr(stats, "SAMPLE", 50)
    lengths = np.full(1000, 7)
    columns = stats.Columns({"images": lengths, "sequence_dense": lengths}, group=np.zeros(1000, int))
    values = stats.forecast(columns, ("dense",), longest=6, batch=4)
    assert values["records_sampled"] == 50
    assert values["dense"]["sequences_cut"] == 1000, "which are counted, not forecast"
    assert values["dense"]["padding_packed"] == 0


# -- plots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("low", [0, 1, 20])
@pytest.mark.parametrize("high", [21, 70, 5000, 3_000_000])
def test_bins_hold_every_number_once(low, high, log):
    if low == 0 and log:
        low = 1
    edges = stats_plots.edges_of([np.array([low, high])], log)
    assert edges[0] < low
    assert edges[-1] > high
    assert (np.diff(edges) > 0).all()
    assert (edges % 1 == 0.5).all(), "no number lies on a border"
    assert len(edges) <= stats_plots.BINS + 2
    if log and high > 100 * low:
        widths = np.diff(edges)
        assert widths[-2] > 10 * widths[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1K"), (12345, "12.3K"), (999_900, "1M"), (9_000_000, "9M"), (2.5e9, "2.5B")],
)
def test_short_numbers(value, text):
    assert stats_plots.short(value) == text


def drawn(records, tmp_path, visual=BY_SIZE, text=True):
    """(files, the report) of these records, with sequences if `text`."""
    found = stats.measure(records, visual=visual, image_folder=tmp_path / "images")
    if text:
        found.records["text_tokens"] = np.arange(5, 5 + len(records))
        for side in ("dense", "skipping", "ffn"):
            found.records[f"sequence_{side}"] = found.records["text_tokens"] + found.records[f"visual_{side}"]
        found.records["supervised_tokens"] = found.records["text_tokens"] // 2
    values = {"file": "x/data.json", **stats.report(records, found, visual, longest=100, batch=2)}
    return stats_plots.draw(values, found, tmp_path / "plots"), values, found


def test_pictures_of_what_there_is(records, catalogue, tmp_path):
    files, _, _ = drawn(records, tmp_path)
    names = ["records.png", "groups.png", "sources.png", "visual_tokens.png", "lengths.png"]
    assert [file.name for file in files] == names
    for file in files:
        with Image.open(file) as picture:
            picture.load()
            assert min(picture.size) > 150
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 5
    files, _, _ = drawn(records, tmp_path, text=False)
    assert [file.name for file in files] == names[:-1]
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == sorted(names), "no temporary files are left"


def test_what_lengths_says(records, catalogue, tmp_path):
    _, values, found = drawn(records, tmp_path)
    axes = stats_plots._lengths(values, found).axes[0]
    cut = Counter({side: int((found.records[f"sequence_{side}"] > 100).sum()) for side in ("dense", "skipping")})
    said = [text.get_text() for text in axes.get_legend().get_texts()]
    assert said == [
        f"dense: mean {found.records['sequence_dense'].mean():.3g}",
        f"with skipping: mean {found.records['sequence_skipping'].mean():.3g}",
        f"--model_max_length 100 (cut: {cut['dense']} dense, {cut['skipping']} skipping)",
    ]
    assert cut == {"dense": 1, "skipping": 1}
    assert axes.get_ylabel() == "records"
    heights = [patch.get_data().values.sum() for patch in axes.patches]
    assert heights == [len(records)] * 4, "every record is in each outline"


def test_what_groups_says(records, catalogue, tmp_path):
    _, values, found = drawn(records, tmp_path)
    left, right = stats_plots._groups(values, found).axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["ocr", "language", stats.UNLISTED, stats.NO_SOURCE]
    assert "4  57.1%" in [text.get_text() for text in left.texts]
    total = sum(patch.get_width() for patch in right.patches)
    assert total == found.records["sequence_dense"].sum(), "text and all parts of the images"


def test_the_smallest_sources_share_a_bar(records, catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(stats_plots, "MOST_SOURCES", 2)
    _, values, found = drawn(records, tmp_path)
    axes = stats_plots._sources(values, found).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()][0::2] == ["doc", "3 more"]
    assert "3  42.9%" in [text.get_text() for text in axes.texts]
