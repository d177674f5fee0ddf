"""`llava-sv release --push-to-hub`: a dry run by default, then what is really sent; logins that are refused."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

from llava_sv import cli
from llava_sv.errors import UserError
from llava_sv.release import hub
from tests.checkpoints import SKIP, save_checkpoint
from tests.release.releases import copy_of, release

REPO = "my-lab/llava-sv-tiny"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    assert release(save_checkpoint(folder / "tiny", SKIP), folder / "release") == 0
    return folder / "release"


def is_private(asked):
    """What creating a repository asked for, in the words of newer and older versions of huggingface_hub."""
    return asked.get("visibility") == "private" or asked.get("private") is True


class Hub(BaseHTTPRequestHandler):
    """A hub's HTTP interface for one model, in memory; what it is asked goes to `server.seen`."""

    def answer(self, code, value=None, **headers):
        body = json.dumps(value if value is not None else {}).encode()
        self.send_response(code)
        for name, text in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(length)
        self.server.seen.append((self.command, self.path, data, self.headers.get("Authorization")))
        refused = self.server.refuse.get(self.path.split("?")[0]) or self.server.refuse.get("all")
        if refused:
            return self.answer(refused, {"error": "no"}, X_Error_Message="no")
        if self.command == "GET" and self.path.startswith(f"/api/models/{REPO}"):
            if self.server.model is None:
                return self.answer(
                    404, {"error": "x"}, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
                )
            return self.answer(200, self.server.model)
        if self.path.startswith("/api/repos/create"):
            self.server.model = {"id": REPO, "private": is_private(json.loads(data)), "siblings": []}
            return self.answer(200, {"url": f"{self.server.url}/{REPO}", "name": REPO})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(data)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            return self.answer(
                200, {"commitUrl": f"{self.server.url}/{REPO}/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
            )
        return self.answer(200, {})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A hub on a free port of this machine, which may be asked though the suite runs with the hub out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        running.seen, running.refuse, running.model = [], {}, None
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def api(server, token="hf_secretsecret"):
    return HfApi(endpoint=server.url, token=token)


def test_a_dry_run_sends_nothing(whole, server, capsys, monkeypatch):
    monkeypatch.setattr(hub, "_send", lambda *_: pytest.fail("something is sent"))
    assert cli.main(["release", str(whole), "--push-to-hub", REPO]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted(path for path in whole.iterdir())
    size = sum(path.stat().st_size for path in files)
    assert lines[0] == f"dry run: would upload to {REPO} (private): {len(files)} files, {size:,} bytes"
    assert [line.split()[-1] for line in lines[1:-1]] == [path.name for path in files]
    assert lines[-1] == "nothing was sent; pass --upload to send it"
    assert cli.main(["release", str(whole), "--push-to-hub", REPO, "--public"]) == 0
    assert f"to {REPO} (public):" in capsys.readouterr().out
    assert not server.seen


def test_release_and_dry_run_in_one(whole, tmp_path, capsys):
    report = tmp_path / "report.json"
    words = ["--push-to-hub", REPO, "--json", report]
    assert release(whole.parent / "tiny", tmp_path / "out", *words) == 0
    values = json.loads(report.read_text())["push"]
    assert (values["repo"], values["private"], values["uploaded"]) == (REPO, True, False)
    assert values["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_what_is_uploaded(whole, tmp_path, server, capsys):
    folder = copy_of(whole, tmp_path)
    (folder / "notes.txt").write_text("mine")
    said = hub.push(folder, REPO, public=False, really=True, api=api(server))
    assert said["uploaded"]
    (created,) = (json.loads(data) for _, path, data, _ in server.seen if path.startswith("/api/repos/create"))
    assert is_private(created)
    assert (created["organization"], created["name"]) == tuple(REPO.split("/"))
    (commit,) = (data for _, path, data, _ in server.seen if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert sent == {path.name for path in whole.iterdir()}, "the files of the manifest, no others"
    assert "hf_secret" not in capsys.readouterr().out


def test_a_refused_login_is_one_line_without_the_token(whole, server, capsys):
    for code, refuse in ((401, "all"), (403, "/api/repos/create")):
        server.refuse = {refuse: code}
        with pytest.raises(UserError) as caught:
            hub.push(whole, REPO, public=False, really=True, api=api(server))
        line = str(caught.value)
        assert line.startswith(f"--push-to-hub {REPO}: the hub refused the login ({code}); run hf auth login")
        assert "hf_secret" not in line + capsys.readouterr().out
        assert "\n" not in line


def test_a_hub_that_fails_or_is_not_there(whole, server):
    server.refuse = {"/api/repos/create": 400}
    with pytest.raises(UserError, match=f"--push-to-hub {REPO}: the hub refused \\(.*400") as caught:
        hub.push(whole, REPO, public=False, really=True, api=api(server))
    assert "hf_secret" not in str(caught.value)
    nobody = HfApi(endpoint="http://127.0.0.1:1", token="hf_secretsecret")
    with pytest.raises(UserError, match=f"--push-to-hub {REPO}: cannot be sent"):
        hub.push(whole, REPO, public=False, really=True, api=nobody)


def fake(info=None, error=None):
    """An api whose model is `info`, none by default; `error` is raised by creating."""
    calls = []

    def model_info(repo):
        if info is None:
            raise RepositoryNotFoundError("x", response=SimpleNamespace(status_code=404, headers={}, request=None))
        return info

    def create_repo(*args, **kwargs):
        calls.append("create")
        if error is not None:
            raise error

    return SimpleNamespace(
        model_info=model_info,
        create_repo=create_repo,
        upload_folder=lambda **kwargs: calls.append("upload"),
        calls=calls,
    )


def holding(*names, private=True):
    return SimpleNamespace(private=private, siblings=[SimpleNamespace(rfilename=name) for name in names])


def test_no_login_at_all(whole):
    with pytest.raises(UserError, match="you are not logged in; run hf auth login"):
        hub.push(whole, REPO, False, True, fake(error=LocalTokenNotFoundError("no token")))


def test_a_repository_that_is_there_already(whole):
    held = fake(holding("config.json", ".gitattributes"))
    hub.push(whole, REPO, False, True, held)
    assert held.calls == ["create", "upload"]
    for info, public, said in (
        (holding("old.bin"), False, "holds 1 other file.s., old.bin first, which would mix"),
        (holding(private=False), False, "is there already, and is public; pass --public if that is meant"),
    ):
        refused = fake(info)
        with pytest.raises(UserError, match=said):
            hub.push(whole, REPO, public, True, refused)
        assert refused.calls == []


def test_a_damaged_release_is_not_uploaded(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    sent = fake()
    with pytest.raises(UserError, match=r"tokenizer.json: has 2 bytes, .*; nothing is uploaded"):
        hub.push(folder, REPO, False, True, sent)
    assert sent.calls == []


@pytest.mark.parametrize(
    "name", ["a", "a/b/c", "a/", "/b", "a b/c", "a/b--c", "a/b..c", "-a/b", "a/b.git", "a/" + "b" * 97]
)
def test_names_that_no_hub_has(name):
    with pytest.raises(UserError, match="not OWNER/NAME"):
        hub.check_name(name)
    hub.check_name(REPO)
