"""The smoke test of a release: clean processes load it as its users will, and must answer as the checkpoint does.

A finished folder and what the checkpoint answered come in; a report goes out, or a `SmokeTestFailed` with the first
thing that differs. Once with `llava_sv` imported, once by `trust_remote_code=True` where `llava_sv` cannot be imported;
both by transformers' Auto classes, offline. Called by `release`; `smoke_worker` is the other process.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

import llava_sv
from llava_sv.conversation import get_template
from llava_sv.errors import UserError
from llava_sv.generation import Assistant, decode, generate, make_batch, user_turn
from llava_sv.model.builder import load_pretrained_model

QUESTION = "What is in this picture?"
NEW_TOKENS = 12
WORKER = Path(__file__).with_name("smoke_worker.py")
PACKAGE = "llava_sv"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Most that logits may differ, as a share of the largest: they are equal unless other kernels run."""

FORMS = {"with llava_sv": None, "by trust_remote_code, without llava_sv": PACKAGE}
"""The ways of loading, each with the package that it does without."""


class SmokeTestFailed(UserError):
    """A release that does not load, or answers otherwise. log: what the process said, for the report."""

    def __init__(self, form: str, what: str, log: str = "") -> None:
        super().__init__(f"smoke test, loaded {form}: {what}; nothing was written")
        self.log = log


@dataclass
class Answer:
    """What the checkpoint says: logits [T, K] of the prompt in float32, the greedy text, and how its turns end."""

    logits: Tensor
    text: str
    stop_strings: tuple[str, ...]
    dtype: torch.dtype


def picture() -> Image.Image:
    """The fixed picture: shapes on a slope of colours, wider than high, so that an encoder sees unequal patches."""
    image = Image.linear_gradient("L").resize((320, 224))
    image = Image.merge("RGB", (image, image.transpose(Image.Transpose.ROTATE_180), Image.new("L", image.size, 90)))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 40, 130, 140), fill=(214, 38, 38))
    draw.rectangle((180, 30, 290, 90), fill=(40, 80, 215))
    draw.polygon([(150, 200), (200, 110), (260, 210)], fill=(242, 208, 30))
    return image


def answer_of(checkpoint: str, base: str | None, dtype: torch.dtype | None, device: str, template: str) -> Answer:
    """Ask a checkpoint by this project's own functions, in `dtype` (default: its own)."""
    tokenizer, model, image_processor, _ = load_pretrained_model(
        checkpoint, base, torch_dtype=dtype, device=device, device_map=None
    )
    assistant = Assistant(tokenizer, model, image_processor, get_template(template))
    image = picture()
    batch = make_batch(assistant, [[user_turn(QUESTION, 1)]], [[image]])
    with torch.inference_mode():
        logits = model(
            batch.input_ids, attention_mask=batch.attention_mask, images=batch.images, image_sizes=batch.image_sizes
        ).logits
    tokens = generate(assistant, batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    found = Answer(
        logits[0].float().cpu().contiguous(),
        decode(assistant, tokens)[0],
        tuple(assistant.template.stop_strings),
        model.dtype,
    )
    del model, assistant, logits
    gc.collect()
    return found


def smoke_test(folder: Path, wanted: Answer, device: str = "cpu") -> dict[str, Any]:
    """Load `folder` in each of `FORMS` and compare; returns what was seen. Raises `SmokeTestFailed`."""
    tolerance = TOLERANCE.get(wanted.dtype, 1e-5) * max(1.0, float(wanted.logits.abs().max()))
    report: dict[str, Any] = {"text": wanted.text, "tolerance": tolerance, "question": QUESTION, "forms": {}}
    with TemporaryDirectory(prefix="llava-sv-smoke.") as place:
        picture().save(Path(place) / "picture.png")
        save_file({"logits": wanted.logits}, str(Path(place) / "reference.safetensors"))
        for form, without in FORMS.items():
            seen = _in_clean_process(folder, Path(place), form, without, device)
            text = seen["text"]
            for stop in wanted.stop_strings:
                text = text.split(stop)[0]
            seen["text"] = text.strip()
            report["forms"][form] = seen
            _compare(form, seen, wanted, tolerance)
    return report


def _compare(form: str, seen: dict[str, Any], wanted: Answer, tolerance: float) -> None:
    if seen["shape"] != list(wanted.logits.shape):
        what = f"logits are of shape {seen['shape']}, the checkpoint's of {list(wanted.logits.shape)}"
    elif not seen["largest_difference"] <= tolerance:
        what = (
            f"logits differ by {seen['largest_difference']:.3g} from the checkpoint's (at most {tolerance:.3g} may be)"
        )
    elif seen["text"] != wanted.text:
        what = f"it answers {seen['text']!r}, the checkpoint {wanted.text!r}"
    else:
        return
    raise SmokeTestFailed(form, what)


def _in_clean_process(folder: Path, place: Path, form: str, without: str | None, device: str) -> dict[str, Any]:
    job = {
        "folder": str(folder.resolve()),
        "package": PACKAGE,
        "without": without,
        "path": _import_path(bool(without)),
        "question": QUESTION,
        "picture": str(place / "picture.png"),
        "reference": str(place / "reference.safetensors"),
        "result": str(place / "result.json"),
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    (place / "result.json").unlink(missing_ok=True)
    shutil.copyfile(WORKER, place / WORKER.name)  # a program outside the package, as its users write
    done = subprocess.run(
        [sys.executable, "-I", str(place / WORKER.name), str(place / "job.json")],
        cwd=place,
        env=_environment(place / ("modules-without" if without else "modules")),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode or not (place / "result.json").is_file():
        raise SmokeTestFailed(form, _last_line(done), done.stderr)
    seen = json.loads((place / "result.json").read_text(encoding="utf-8"))
    return {**seen, "log": done.stderr.splitlines()[-20:]}


def _import_path(bare: bool) -> list[str]:
    """This process's own places to import from, and for the form that has it the package's."""
    home = str(Path(llava_sv.__file__).resolve().parents[1])
    places = [str(Path(place).resolve()) for place in sys.path if place and Path(place).is_dir()]
    others = [place for place in places if not (Path(place) / PACKAGE / "__init__.py").is_file()]
    return others if bare else [*others, home]


def _environment(modules: Path) -> dict[str, str]:
    """This process's variables without Python's own and without secrets, and with no way to a hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and "TOKEN" not in k}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_MODULES_CACHE": str(modules),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the process was killed by signal {-done.returncode} (out of memory?)"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return " ".join((lines[-1] if lines else f"exit code {done.returncode}, and nothing said").split())[:400]
