"""What every `llava-sv analyze` command shares: flags, the checkpoint, a folder's pictures as a stream, and where
results go. A command computes arrays from `Job.samples()` and hands them to `Results.save` with a function that draws.

B is 1 throughout: one picture and one prompt at a time, so that any number of pictures takes the memory of one.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from llava_sv.bench import clock
from llava_sv.bench.sizes import find_dtype
from llava_sv.errors import UserError, not_written
from llava_sv.extras import require
from llava_sv.files import check_can_write, replacing, write_json
from llava_sv.generation import Assistant, PromptBatch, load_for_inference, make_batch, user_turn
from llava_sv.mm_utils import load_image
from llava_sv.model.splice import SplicedBatch

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Files of a folder that are taken for pictures; others are passed over."""

DEFAULT_OUTPUT = "playground/analysis"
DEFAULT_PROMPT = "Describe this image."


def make_parser(command: str, description: str, example: str, with_model: bool = True) -> argparse.ArgumentParser:
    """The flags that commands share; with_model: also those that name a checkpoint and pictures."""
    parser = argparse.ArgumentParser(
        prog=f"llava-sv analyze {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if with_model:
        parser.add_argument("--model-path", required=True, help="a checkpoint folder or a Hugging Face id")
        parser.add_argument("--model-base", help="language model of a lone projector, or base of LoRA adapters")
        parser.add_argument("--image-folder", required=True, help="pictures, in folders of any depth")
        parser.add_argument("--num-images", type=int, default=32, help="the first so many by name; 0: all (default 32)")
        parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f"asked of each (default: {DEFAULT_PROMPT!r})")
        parser.add_argument("--conv-template", help="conversation template (default: the checkpoint's)")
        parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
        parser.add_argument("--dtype", help="precision of the computation (default: the checkpoint's)")
    parser.add_argument(
        "--output", default=DEFAULT_OUTPUT, metavar="DIR", help=f"folder of {command}.npz, .json and .png "
        f"(default {DEFAULT_OUTPUT})",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left there")
    return parser


def find_pictures(folder: str, limit: int = 0) -> list[Path]:
    """Paths of the pictures under `folder`, sorted, the first `limit` (0: all). Only names are read.

    Raises `UserError` for a folder that is absent or holds none.
    """
    if limit < 0:
        raise UserError(f"--num-images {limit}: must be 0 (all) or more")
    root = Path(folder)
    if not root.is_dir():
        what = "is a file; name the folder that it lies in" if root.is_file() else "no such folder"
        raise UserError(f"--image-folder {folder}: {what}")
    paths = sorted(
        Path(place, name)
        for place, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES)
    )
    if not paths:
        raise UserError(f"--image-folder {folder}: holds no pictures ({', '.join(SUFFIXES)}); name another folder")
    return paths[:limit] if limit else paths


@dataclass
class Sample:
    """One picture with its prompt. name: relative to the image folder; batch: one row, see `generation.PromptBatch`."""

    name: str
    image: Image.Image
    batch: PromptBatch


@dataclass
class Job:
    """A checkpoint, ready, and the pictures it is shown."""

    assistant: Assistant
    model_path: str
    folder: Path
    paths: list[Path]
    prompt: str
    unreadable: list[str] = field(default_factory=list)
    """Names of pictures that could not be read, and were passed over."""

    @property
    def model(self) -> Any:
        """The LLaVA."""
        return self.assistant.model

    def samples(self, what: str) -> Iterator[Sample]:
        """Every picture that can be read, with progress named `what`; the others are named on stderr.

        Raises `UserError` where none could be.
        """
        for path in tqdm(self.paths, desc=what, unit="image"):
            name = str(path.relative_to(self.folder))
            try:
                image = load_image(path)
            except UserError as error:
                if name not in self.unreadable:
                    self.unreadable.append(name)
                    tqdm.write(f"passed over: {error}", file=sys.stderr)
                continue
            yield Sample(name, image, make_batch(self.assistant, [[user_turn(self.prompt, 1)]], [[image]]))
        if len(self.unreadable) == len(self.paths):
            raise UserError(f"--image-folder {self.folder}: none of its {len(self.paths)} pictures can be read")

    @torch.no_grad()
    def splice(self, sample: Sample) -> SplicedBatch:
        """The sample's sequence as the decoder gets it: [1, T, C] embeddings and [1, T] roles."""
        batch = sample.batch
        return self.model.prepare_inputs_labels_for_multimodal(
            batch.input_ids, attention_mask=batch.attention_mask, images=batch.images, image_sizes=batch.image_sizes
        )

    def facts(self) -> dict[str, Any]:
        """On what the results rest: checkpoint, pictures, prompt, machine."""
        config = self.model.config
        weight = next(self.model.parameters())
        return {
            "checkpoint": self.model_path,
            "family": config.mm_family,
            "skip_vision": config.skip_vision.to_dict() if config.skip_vision else None,
            "layers": config.num_hidden_layers,
            "images": len(self.paths) - len(self.unreadable),
            "unreadable": self.unreadable,
            "prompt": self.prompt,
            "environment": clock.environment(weight.device, weight.dtype),
        }


def open_job(args: argparse.Namespace) -> Job:
    """The job that `make_parser`'s flags describe. Pictures are looked for before weights are loaded.

    Raises `UserError` for a folder without pictures, and a checkpoint that cannot be loaded or has no encoder.
    """
    paths = find_pictures(args.image_folder, args.num_images)
    dtype = find_dtype(args.dtype) if args.dtype else None
    assistant = load_for_inference(
        args.model_path, args.model_base, conv_template=args.conv_template, device=args.device
    )
    if not assistant.has_vision:
        raise UserError(f"--model-path {args.model_path}: this checkpoint has no vision encoder; name one that has")
    if dtype is not None:
        assistant.model.to(dtype)
    return Job(assistant, args.model_path, Path(args.image_folder), paths, args.prompt)


class Results:
    """The three files of a command: arrays (.npz), numbers (.json), the figure (.png)."""

    def __init__(self, folder: str, command: str, overwrite: bool = False):
        """Raises `UserError` before any work: for files that exist (kept unless `overwrite`), and a folder that cannot
        be written; `ModuleNotFoundError` without matplotlib."""
        require("matplotlib")
        self.paths = {kind: Path(folder, f"{command}.{kind}") for kind in ("npz", "json", "png")}
        there = [str(path) for path in self.paths.values() if path.exists()]
        if there and not overwrite:
            raise UserError(f"--output {folder}: {', '.join(there)} exists; name another folder, or --overwrite")
        check_can_write("--output", self.paths["json"])

    def add_figure(self, name: str, overwrite: bool = False) -> None:
        """One more figure, `name`.png beside the others; raises `UserError` where it exists, as they do."""
        path = self.paths["json"].with_name(f"{name}.png")
        if path.exists() and not overwrite:
            raise UserError(f"--output {path.parent}: {path} exists; name another folder, or --overwrite")

    def save_figure(self, name: str, draw: Callable[[], Any]) -> None:
        """Write `name`.png of `add_figure`, whole or not at all. draw: makes a matplotlib figure, closed here."""
        path = self.paths["json"].with_name(f"{name}.png")
        with self._drawn(draw) as figure, replacing(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
        print(f"wrote {path}")

    def save(self, arrays: dict[str, np.ndarray], numbers: dict[str, Any], draw: Callable[[], Any]) -> None:
        """Write all three, each whole or not at all, and say where. draw: makes a matplotlib figure, closed here."""
        with self._drawn(draw) as figure:
            with replacing(self.paths["npz"]) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
            with replacing(self.paths["png"]) as temporary:
                figure.savefig(temporary, dpi=130, format="png")
            write_json(self.paths["json"], plain(numbers))
        print(f"wrote {', '.join(str(path) for path in self.paths.values())}")

    @contextmanager
    def _drawn(self, draw: Callable[[], Any]) -> Iterator[Any]:
        """The figure that `draw` makes, while files are written; one that cannot be is said in one line."""
        from matplotlib import pyplot

        figure = draw()
        try:
            yield figure
        except OSError as error:
            raise not_written(f"--output {self.paths['json'].parent}:", error, "name another folder") from error
        finally:
            pyplot.close(figure)


def finite_mean(rows: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(rows)
    count = finite.sum(axis=0)
    total = np.where(finite, rows, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays and numpy numbers become lists and numbers, what is not finite None."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
