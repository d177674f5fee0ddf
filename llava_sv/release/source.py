"""A checkpoint's folder by what the user calls it: a path, or a Hugging Face id, whose files are then fetched.
Called by `convert`, and by LLaVA's layout for an encoder or a base."""

from __future__ import annotations

from pathlib import Path

from llava_sv.errors import UserError, in_words

WANTED = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", "*.bin"]
"""Files of a repository that make a checkpoint; of weights in both forms safetensors are fetched alone."""


def local_folder(name: str) -> Path:
    """The folder `name`, or the cached copy of the repository that it names. `UserError` where there is neither."""
    path = Path(name)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "~", "/")) or path.parent.is_dir():
        if not path.is_dir():
            why = "is a file; give the folder that it is in" if path.is_file() else "no such folder"
            raise UserError(
                f"{name}: {why if path.is_file() else why + '; give a checkpoint folder or a Hugging Face id'}"
            )
        return path
    from huggingface_hub import HfApi, snapshot_download

    from llava_sv.model.checkpoint_io import out_of_reach

    try:
        if out_of_reach():
            return _cached(name)
        files = HfApi().list_repo_files(name)
        wanted = [pattern for pattern in WANTED if pattern != "*.bin" or not any("safetensors" in f for f in files)]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # the hub's own errors are of these kinds
        raise UserError(f"{name}: no such folder, and it cannot be fetched ({in_words(error)})") from error


def _cached(name: str) -> Path:
    """The copy of a repository that an earlier download left. `UserError` where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError as error:  # its own words speak of an argument that no user of a command has
        raise UserError(
            f"{name}: no such folder, and offline no copy of it was fetched before; fetch it where there is a network "
            f"(hf download {name}), or give a folder"
        ) from error
