"""A checkpoint's tokenizer and generation settings written into a new folder, its files as they are where they may.
Called by to_hf and to_sv."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llava_sv.files import read_json
from llava_sv.model.builders.tokenizer import read_tokenizer
from llava_sv.release.kept import GROUPS, core_of
from llava_sv.release.plan import Plan

PROCESSOR_CLASS = "processor_class"


def write_tokenizer(plan: Plan, folder: Path) -> None:
    """The plan's tokenizer: the source's own files where they make it, else those that transformers writes. No file
    names a processor's class: that is the layout's to say."""
    names = [name for name in GROUPS["tokenizer"] if (plan.source / name).is_file()]
    own = "tokenizer.json" in names and core_of(read_tokenizer(str(plan.source))) == core_of(plan.tokenizer)
    if own:
        for name in names:
            shutil.copyfile(plan.source / name, folder / name)
    else:
        plan.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        values = read_json(path, "the download or the training again")
        if isinstance(values, dict) and PROCESSOR_CLASS in values:
            del values[PROCESSOR_CLASS]
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_chat_template(plan: Plan, folder: Path) -> None:
    """The source's chat template, where it has one in a file of its own."""
    for name in GROUPS["chat"]:
        if (plan.source / name).is_file():
            shutil.copyfile(plan.source / name, folder / name)


def write_generation(plan: Plan, folder: Path) -> None:
    """The source's generation settings, where it has them."""
    path = plan.source / "generation_config.json"
    if path.is_file():
        shutil.copyfile(path, folder / path.name)
