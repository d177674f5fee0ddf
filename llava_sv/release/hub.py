"""A release on its way to a hub, through huggingface_hub: a dry run unless the upload was asked for in so many words.

A folder that `verify` finds whole comes in; the files that its manifest lists are sent, no others. The login is
huggingface_hub's own; no token is read, taken or shown here. Called by `release`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llava_sv.errors import UserError, in_words
from llava_sv.release import manifest, verify

GO = "--upload"
"""The flag that makes an upload of a dry run."""

OWNER_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}")
LEFT_BY_HUB = (".gitattributes",)


def check_name(repo: str) -> None:
    """`UserError` for what cannot be a model's name on a hub."""
    bad = re.search(r"--|\.\.|[.-]$|\.git$", repo)
    if not OWNER_NAME.fullmatch(repo) or bad:
        raise UserError(
            f"--push-to-hub {repo}: not OWNER/NAME (letters, digits, '-', '_' and '.'; no '--' or '..'; at most 96)"
        )


def push(folder: Path, repo: str, public: bool, really: bool, api: Any = None) -> dict[str, Any]:
    """Upload `folder` to `repo`, or only say what would be. Returns what was said, for a report.

    public: the repository is made for everybody to read; else it is private. api: a `huggingface_hub.HfApi`.
    Raises `UserError`: a folder that is not whole, a login that is refused, a repository that holds something else.
    """
    check_name(repo)
    found = verify.check(folder)
    if found.problems:
        raise UserError(f"{folder}: {found.problems[0].line}; nothing is uploaded (llava-sv verify {folder} lists all)")
    names = sorted([*manifest.read(folder)["files"], manifest.NAME])
    size = sum((folder / name).stat().st_size for name in names)
    said = {"repo": repo, "private": not public, "files": names, "bytes": size, "uploaded": really}
    kind = "public" if public else "private"
    print(f"{'upload' if really else 'dry run: would upload'} to {repo} ({kind}): {len(names)} files, {size:,} bytes")
    for name in names:
        print(f"  {(folder / name).stat().st_size:>15,}  {name}")
    if not really:
        print(f"nothing was sent; pass {GO} to send it")
        return said
    said["url"] = _send(folder, repo, public, names, api)
    print(f"uploaded: {said['url']}")
    return said


def _send(folder: Path, repo: str, public: bool, names: list[str], api: Any) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi() if api is None else api
    try:
        _check_remote(api, repo, public, names)
        api.create_repo(repo, repo_type="model", private=not public, exist_ok=True)
        done = api.upload_folder(
            folder_path=str(folder),
            repo_id=repo,
            repo_type="model",
            allow_patterns=[_literally(name) for name in names],
            commit_message=f"Release {folder.absolute().name}",
        )
    except LocalTokenNotFoundError as error:
        raise UserError(f"--push-to-hub {repo}: you are not logged in; run hf auth login") from error
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        if code in (401, 403):
            raise UserError(
                f"--push-to-hub {repo}: the hub refused the login ({code}); run hf auth login with a token that may "
                "write there"
            ) from error
        why = f"{code}, {_without_secrets(error)}"
        raise UserError(f"--push-to-hub {repo}: the hub refused ({why}); try again later") from error
    except Exception as error:
        if not _of_network(error) and not isinstance(error, (HFValidationError, OfflineModeIsEnabled, OSError)):
            raise
        raise UserError(f"--push-to-hub {repo}: cannot be sent ({_without_secrets(error)})") from error
    return str(getattr(done, "repo_url", None) or done)


def _check_remote(api: Any, repo: str, public: bool, names: list[str]) -> None:
    """`UserError` for a repository that is there already and would mix with this release, or is seen by all."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        return
    if not info.private and not public:
        raise UserError(f"--push-to-hub {repo}: is there already, and is public; pass --public if that is meant")
    others = sorted(f.rfilename for f in info.siblings or () if f.rfilename not in (*names, *LEFT_BY_HUB))
    if others:
        raise UserError(
            f"--push-to-hub {repo}: holds {len(others)} other file(s), {others[0]} first, which would mix with this "
            "release; name a new repository, or remove them there"
        )


def _literally(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _of_network(error: Exception) -> bool:
    """Whether an error is one of the libraries that huggingface_hub has spoken HTTP by, release after release."""
    libraries = ("httpx", "httpx2", "httpcore", "requests")
    return any(kind.__module__.split(".")[0] in libraries for kind in type(error).__mro__)


def _without_secrets(error: Exception) -> str:
    return re.sub(r"hf_\w+|Bearer \S+", "(hidden)", in_words(error))
