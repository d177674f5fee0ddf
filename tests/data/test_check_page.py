"""`llava-sv data check` of shards and mixtures, and its page as a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from llava_sv import cli
from llava_sv.data import index
from llava_sv.data.records import check_record
from tests.data.samples import exchange, text_only, with_image
from tests.data.test_check import _run, _write, images  # noqa: F401


@pytest.mark.parametrize("shape", ["tar", "parquet"])
def test_shards_bring_their_pictures_along(tmp_path, images, capsys, shape):  # noqa: F811
    """No --image-folder; a picture damaged in its shard is named; --fix keeps the references and sources."""
    values = [{**with_image(f"r{number}", "b.jpg"), "source": "coco"} for number in range(5)] + [text_only("t")]
    shards, path = tmp_path / "shards", _write(tmp_path, values)
    arguments = ["--image-folder", str(images), "--format", shape, "--output", str(shards)]
    assert cli.main(["data", "shard", str(path), *arguments]) == 0
    code, report = _run(shards, tmp_path)
    assert (code, report["good_records"], report["problems"]) == (0, 6, 0)
    assert report["image_files"] == 5
    assert report["images_opened"]
    fixed = tmp_path / "fixed.jsonl"
    assert _run(shards, tmp_path, "--fix", fixed)[0] == 0
    kept = [json.loads(line) for line in fixed.read_text().splitlines()]
    assert [record.get("source") for record in kept] == ["coco"] * 5 + [None]
    assert _run(fixed, tmp_path, "--image-folder", shards)[1]["problems"] == 0
    shard = next(shards.glob(f"*.{shape}"))
    data = (images / "b.jpg").read_bytes()
    shard.write_bytes(shard.read_bytes().replace(data, b"\0" * len(data), 2))
    code, report = _run(shards, tmp_path, "--no-images")
    assert (code, report["images_opened"]) == (0, False)
    if shape == "tar":
        code, report = _run(shards, tmp_path)
        assert (code, report["kinds"]["corrupt_image"]) == (2, 2)


def test_a_mixture_needs_to_be_told_where_pictures_are(tmp_path, images, capsys):  # noqa: F811
    folder = tmp_path / "mix"
    folder.mkdir()
    with index.IndexWriter(folder / "index.arrow") as writer:
        for number, picture in enumerate(["b.jpg", "gone.jpg"]):
            writer.add(check_record(with_image(f"r{number}", picture), "f"), "coco", number + 1)
    assert cli.main(["data", "check", str(folder)]) == 2
    assert "say where the pictures are with --image-folder" in capsys.readouterr().err
    code, report = _run(folder, tmp_path, "--image-folder", images)
    assert (code, report["kinds"]) == (2, {"missing_image": 1})


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_browser_shows_the_page_and_runs_nothing_of_the_data(tmp_path, images):  # noqa: F811
    """Ids and names that would be markup, script or a link are words; thumbnails are drawn."""
    hostile = ['<script>document.title = "run"</script>', "javascript:alert(1)", '"><img src=x onerror="run()">.png']
    values = [{**text_only(name, "Who?", answer=""), "id": name} for name in hostile]
    values += [with_image("red", "torn.png"), with_image('"quoted"', hostile[2])]
    values.append({"id": "s", "conversations": [{**turn, "from": hostile[0]} for turn in exchange("a", "b")]})
    page = tmp_path / "page.html"
    _run(_write(tmp_path, values), tmp_path, "--image-folder", images, "--html", page)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]

    def run(*more):
        return subprocess.run(
            [*command, *more, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        ).stdout

    shown = run("--dump-dom")
    assert "<title>" in shown
    assert ">run</title>" not in shown
    assert "<script" not in shown
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)', shown))
    assert shown.count("<img") == shown.count('src="data:image/jpeg;base64,') == 1
    shot = tmp_path / "page.png"
    run(f"--screenshot={shot}", "--window-size=1000,1400")
    with Image.open(shot) as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
