"""`llava-sv verify`: what it says of a whole download, and that every kind of damage is found and named."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_sv.release import manifest
from llava_sv.release.tensor_bytes import BadHeader, checksums, spans_of
from tests.checkpoints import SKIP, save_checkpoint
from tests.release.releases import copy_of, edit_json, fitting_manifest, release, verify

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A release in several shards."""
    folder = tmp_path_factory.mktemp("verify")
    assert release(save_checkpoint(folder / "tiny", SKIP), folder / "release", "--shard-size", "60KB") == 0
    assert len(list((folder / "release").glob("*.safetensors"))) >= 3
    return folder / "release"


@pytest.fixture
def download(whole, tmp_path):
    return copy_of(whole, tmp_path)


def said(folder, capsys):
    """(exit code, lines that name a problem)."""
    capsys.readouterr()
    code = verify(folder)
    out = capsys.readouterr().out.splitlines()
    bad = [line.removeprefix("bad: ") for line in out if line.startswith("bad: ")]
    assert (code == 2) == bool(bad)
    if bad:
        count = "1 problem;" if len(bad) == 1 else f"{len(bad)} problems;"
        assert out[-1].startswith(f"{folder}: {count}")
    return bad


def shard_of(folder, tensor):
    return folder / json.loads((folder / manifest.NAME).read_text())["tensors"][tensor]["file"]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def rename(path, old, new):
    """Another name of the same length in a file's header."""
    data = path.read_bytes()
    assert data.count(old.encode()) >= 1
    assert len(old) == len(new)
    path.write_bytes(data.replace(old.encode(), new.encode()))


def test_the_manifest_against_an_oracle(whole):
    values = json.loads((whole / manifest.NAME).read_text())
    files = sorted(path.name for path in whole.iterdir() if path.name != manifest.NAME)
    assert sorted(values["files"]) == files
    for name in files:
        data = (whole / name).read_bytes()
        assert values["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    seen = {}
    for path in whole.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            seen[name] = {"file": path.name, "shape": list(tensor.shape), "dtype": "F32", "sha256": digest}
    assert values["tensors"] == seen
    assert values["format"] == 1


def test_a_whole_download(whole, capsys, tmp_path):
    assert verify(whole, "--json", tmp_path / "report.json") == 0
    values = json.loads((whole / manifest.NAME).read_text())
    size = sum(entry["bytes"] for entry in values["files"].values())
    line = f"{whole}: whole ({len(values['files'])} files, {size:,} bytes, {len(values['tensors'])} tensors)"
    assert capsys.readouterr().out.strip() == line
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["ok"], report["problems"], report["tensors"]) == (True, [], len(values["tensors"]))


def test_as_a_hub_cache_has_it(whole, tmp_path, capsys):
    """Links to blobs, and what hubs leave beside a download."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate(sorted(whole.iterdir())):
        (blobs / str(index)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{index}")
    (snapshot / ".gitattributes").write_text("*.safetensors filter=lfs")
    (snapshot / ".cache" / "huggingface").mkdir(parents=True)
    (snapshot / ".cache" / "huggingface" / "x.safetensors").write_text("")
    assert said(snapshot, capsys) == []
    (snapshot / "model-00001-of-00001.safetensors").unlink(missing_ok=True)
    broken = sorted(snapshot.glob("*.safetensors"))[0]
    (blobs / str(sorted(p.name for p in whole.iterdir()).index(broken.name))).unlink()
    (line,) = said(snapshot, capsys)
    assert line.startswith(f"{broken.name}: is missing; it held ")


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_byte_is_named_by_file_and_tensor(download, capsys, where):
    path = shard_of(download, NORM)
    spans = spans_of(path)
    span = {"first": spans[0], "middle": spans[len(spans) // 2], "last": spans[-1]}[where]
    flip(path, span.start if where != "last" else span.end - 1)
    assert said(download, capsys) == [f"{path.name}: damaged in {span.name} (SHA-256 differs from the manifest's)"]


def test_every_problem_is_listed(download, capsys, tmp_path):
    path = shard_of(download, NORM)
    one, two = spans_of(path)[:2]
    flip(path, one.start)
    flip(path, two.start)
    flip(download / "tokenizer.json", 10)
    (download / "sv_errors.py").unlink()
    (download / "chat_template.jinja").write_text("{{ messages }}")
    assert verify(download, "--json", tmp_path / "report.json") == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad: ")]
    size = json.loads((download / manifest.NAME).read_text())["files"]["chat_template.jinja"]["bytes"]
    assert lines == [
        f"bad: chat_template.jinja: has 14 bytes, {size:,} were released",
        f"bad: {path.name}: damaged in {one.name}, {two.name} (SHA-256 differs from the manifest's)",
        "bad: sv_errors.py: is missing",
        "bad: tokenizer.json: damaged (its SHA-256 differs from the manifest's)",
    ]
    report = json.loads((tmp_path / "report.json").read_text())
    assert [problem["kind"] for problem in report["problems"]] == ["size", "damaged", "missing", "damaged"]
    assert report["problems"][1]["tensors"] == [one.name, two.name]


def test_a_missing_shard_is_named_with_its_tensors(download, capsys):
    path = shard_of(download, NORM)
    names = sorted(span.name for span in spans_of(path))
    path.unlink()
    (line,) = said(download, capsys)
    assert line.startswith(f"{path.name}: is missing; it held {len(names)} tensors: {', '.join(names[:5])}")


def test_a_download_that_was_cut_off(download, capsys):
    path = shard_of(download, NORM)
    last = spans_of(path)[-1]
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 1)
    cut = f"{path.name}: has {size - 1:,} bytes, {size:,} were released"
    assert said(download, capsys) == [f"{cut}; 1 tensor cut off: {last.name}"]
    count = len(spans_of(path))
    with open(path, "r+b") as file:
        file.truncate(100)
    (line,) = said(download, capsys)
    assert line.startswith(f"{path.name}: has 100 bytes, {size:,} were released; its header is damaged: the file ends")
    assert line.endswith(f"it held {count} tensors")


def test_damage_to_a_header(download, capsys):
    path = shard_of(download, NORM)
    count = len(spans_of(path))
    flip(path, 8)  # the brace
    (line,) = said(download, capsys)
    assert line.startswith(f"{path.name}: its header is damaged: ")
    assert line.endswith(f"; it held {count} tensors")


def test_a_changed_note_in_a_header(download, capsys):
    path = shard_of(download, NORM)
    rename(path, '"format":"pt"', '"format":"px"')
    (line,) = said(download, capsys)
    assert line.startswith(f"{path.name}: its header differs from the one released")


def test_a_renamed_key_is_named(download, capsys):
    path = shard_of(download, NORM)
    rename(path, NORM, "model.nrom.weight")
    lines = said(download, capsys)
    assert lines[0] == f"{path.name}: has model.nrom.weight, lacks {NORM} (by manifest.json)"
    assert lines[-1] == f"{path.name}: has model.nrom.weight, lacks {NORM} (by config.json)"


def test_a_renamed_key_is_named_also_where_the_manifest_fits(download, capsys):
    path = shard_of(download, NORM)
    rename(path, NORM, "model.nrom.weight")
    rename(download / "model.safetensors.index.json", NORM, "model.nrom.weight")
    fitting_manifest(download)
    assert said(download, capsys) == [f"{path.name}: has model.nrom.weight, lacks {NORM} (by config.json)"]


def test_another_shape_where_the_manifest_fits(download, capsys):
    path = shard_of(download, NORM)
    tensors = load_file(path)
    tensors[NORM] = tensors[NORM][:5].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    fitting_manifest(download)
    assert said(download, capsys) == [f"{path.name}: has in another shape than config.json says: {NORM}"]


def test_an_index_that_disagrees_with_the_shards(download, capsys):
    index = download / "model.safetensors.index.json"
    held = shard_of(download, NORM).name
    other = next(p.name for p in download.glob("*.safetensors") if p.name != held)

    def change(values):
        values["weight_map"][NORM] = other
        values["weight_map"]["model.extra"] = held
        values["weight_map"]["model.gone"] = "model-x.safetensors"
        del values["weight_map"]["lm_head.weight"]

    edit_json(index, change)
    fitting_manifest(download)
    assert said(download, capsys) == [
        f"{index.name}: lists model.extra, which no file has, lacks lm_head.weight",
        f"{index.name}: says another file than the one it is in for {NORM}",
        f"{index.name}: names files of weights that are not there: model-x.safetensors",
    ]
    index.write_text("{")
    fitting_manifest(download)
    (line,) = said(download, capsys)
    assert line == f"{index.name}, line 1, column 2: not JSON (Expecting property name enclosed in double quotes)"
    index.unlink()
    fitting_manifest(download)
    (line,) = said(download, capsys)
    assert line.startswith(f"{index.name}: is missing, and there are ")


def test_a_config_that_is_not_json_or_another_model(download, capsys):
    config = download / "config.json"
    text = config.read_text()
    config.write_text("{")
    assert said(download, capsys)[1].startswith("config.json: no model can be built of it (config.json: malformed JSON")
    config.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    lines = said(download, capsys)
    assert lines[0] == "config.json: damaged (its SHA-256 differs from the manifest's)"
    assert "has model.layers.1.input_layernorm.weight" in lines[1]
    config.unlink()
    assert said(download, capsys) == ["config.json: is missing"]


def test_files_that_are_no_part_of_it(download, capsys):
    for name in ("notes.txt", "sv_more.py", "pytorch_model.bin", "model-9.safetensors"):
        (download / name).write_text("x")
    (download / "sub").mkdir()
    (download / "sub" / "code.py").write_text("x")
    capsys.readouterr()
    assert verify(download) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "note: notes.txt: is no part of the release"
    assert lines[1:5] == [
        "bad: model-9.safetensors: is no part of the release, and it is a file of weights; remove it",
        "bad: pytorch_model.bin: is no part of the release, and it is a file of weights; remove it",
        "bad: sub/code.py: is no part of the release, and it is code; remove it",
        "bad: sv_more.py: is no part of the release, and it is code; remove it",
    ]
    assert lines[5].endswith("4 problems; remove what is named above, then run llava-sv verify once more")


def test_a_changed_manifest(download, capsys):
    edit_json(download / manifest.NAME, lambda values: values["files"]["tokenizer.json"].update(bytes=7))
    lines = said(download, capsys)
    assert lines[0] == "manifest.json: was changed after it was written (its own checksum differs)"
    assert lines[1].endswith(" bytes, 7 were released")


def test_a_manifest_without_its_own_checksum(download, capsys):
    edit_json(download / manifest.NAME, lambda values: values.pop(manifest.SELF))
    assert said(download, capsys) == ["manifest.json: was changed after it was written (its own checksum differs)"]


@pytest.mark.parametrize(
    ("old", "new"),
    [('"float32"', '"floet32"'), ('"patch_size": 8', '"patch_size": 0'), ('"hidden_size": 32', '"hidden_size": -1')],
)
def test_a_config_of_which_no_model_can_be_built(download, capsys, old, new):
    """Whatever the model's classes raise is a line."""
    config = download / "config.json"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    fitting_manifest(download)
    (line,) = said(download, capsys)
    assert line.startswith("config.json: no model can be built of it (")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "..", "", "a//b", "C:\\x", "a\\..\\b", "./a", "~/x", "a\nb"]
)
def test_names_that_lead_out_of_the_folder_are_refused(download, capsys, name):
    entry = {"bytes": 1, "sha256": "0"}
    edit_json(download / manifest.NAME, lambda values: values["files"].update({name: entry}))
    assert verify(download) == 2
    line = capsys.readouterr().err.strip()
    what = f"names {name!r}, which is not a file of this folder; do not trust this download"
    assert line == f"error: {download}/manifest.json: {what}"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda values: values.update(format=2), "is of format 2, this version reads 1"),
        (lambda values: values.pop("files"), "is no manifest of a release"),
        (lambda values: values["files"]["config.json"].pop("sha256"), "files, 'config.json': has no sha256"),
        (lambda values: values["tensors"][NORM].pop("file"), f"tensors, '{NORM}': has no file"),
        (lambda values: values["tensors"][NORM].update(file="x"), f"{NORM} is said to be in x, which is none of"),
        (lambda values: values["tensors"][NORM].update(file="../x"), "names '../x', which is not a file of this"),
    ],
)
def test_a_manifest_that_cannot_be_read(download, capsys, change, what):
    edit_json(download / manifest.NAME, change)
    assert verify(download) == 2
    assert capsys.readouterr().err.startswith(f"error: {download}/manifest.json: {what}")


def test_folders_that_are_no_release(tmp_path, download, capsys):
    assert verify(tmp_path / "none") == 2
    assert f"error: {tmp_path}/none: no such folder" in capsys.readouterr().err
    assert verify(download / "config.json") == 2
    assert capsys.readouterr().err == f"error: {download}/config.json: is a file; give the folder that it is in\n"
    (download / manifest.NAME).unlink()
    assert verify(download) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {download}: has no manifest.json, so there is nothing to check it against")
    (download / manifest.NAME).write_text("{")
    assert verify(download) == 2
    assert "line 1, column 2: not JSON" in capsys.readouterr().err


def test_a_header_that_lies(tmp_path):
    """Spans that overlap, leave gaps or have no known type are no header."""
    path = tmp_path / "x.safetensors"

    def write(header, data=bytes(8)):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    good = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    write({**good, "b": {"dtype": "I8", "shape": [2, 2], "data_offsets": [4, 8]}, "__metadata__": {"format": "pt"}})
    assert [(span.name, span.shape) for span in spans_of(path)] == [("a", (1,)), ("b", (2, 2))]
    assert checksums(path, spans_of(path))[1]["b"] == hashlib.sha256(bytes(4)).hexdigest()
    for entry in (
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 8]},
        {"dtype": "F99", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1]},
    ):
        write({**good, "b": entry})
        with pytest.raises(BadHeader):
            spans_of(path)
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(BadHeader, match="announce a header"):
        spans_of(path)


@pytest.mark.parametrize(
    "name",
    ["adapter_config.json", "chat_template.json", "additional_chat_templates/x.jinja", "tokenizer.model", "EXTRA.PY"],
)
def test_files_that_would_change_what_is_loaded(download, capsys, name):
    """`adapter_config.json` alone makes transformers load another base than the folder's own weights."""
    (download / name).parent.mkdir(exist_ok=True)
    (download / name).write_text("{}")
    assert verify(download) == 2
    assert f"bad: {name}: is no part of the release, and it is " in capsys.readouterr().out


def test_a_linked_folder_is_noted(download, tmp_path, capsys):
    (download / "more").symlink_to(tmp_path)
    assert verify(download) == 0
    assert "note: more: is no part of the release\n" in capsys.readouterr().out


def test_a_config_without_its_encoder_is_found_without_a_network(download, capsys, monkeypatch):
    edit_json(download / "config.json", lambda values: values.update(vision_config=None, mm_vision_tower="no/such"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
    assert verify(download) == 2
    assert "bad: config.json: no model can be built of it (it holds no encoder)" in capsys.readouterr().out
