"""One label file a picture, in a folder beside the pictures' (CogVLM-SFT-311K): files arrive, records leave.

    llava_details-minigpt4_3500_formate/images/00000001.jpg
    llava_details-minigpt4_3500_formate/labels_en/00000001.json    {"captions": [{"role": "caption", "content": ...}]}
    .../labels_zh/00000001.json            {"conversations": [{"role": "user" | "assistant", "content": ...}, ...]}

Options: images [images], the pictures' folder beside the labels'; suffix [.jpg]; describe, the question to a caption
[Describe the image in detail.].
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sv.data.converters.attempt import attempt, text
from llava_sv.data.converters.items import Inputs, Item, conversation
from llava_sv.data.converters.llava_json import human_and_gpt, place_before
from llava_sv.data.converters.prompts import DESCRIBE_IN_DETAIL


def label_files(inputs: Inputs) -> Iterator[Item]:
    """One record a label file; a file that is damaged is one entry that is."""
    for path in inputs.files:
        yield attempt(str(path), _record, inputs, path)


def _record(inputs: Inputs, path: Path) -> dict[str, Any]:
    label = json.loads(path.read_text(encoding="utf-8-sig"))
    folder = path.parent.parent
    image = inputs.relative(folder / inputs.option("images", "images") / (path.stem + inputs.option("suffix", ".jpg")))
    identity = f"{folder.name}/{path.stem}"
    if "captions" in label:
        question = inputs.option("describe", DESCRIBE_IN_DETAIL)
        return conversation(identity, [(question, text(label["captions"][0], "content"))], [image])
    turns = human_and_gpt(label["conversations"])
    if not any(turn["from"] == "gpt" for turn in turns):
        raise ValueError("has no answer")
    place_before(turns, 1)
    return {"id": identity, "image": image, "conversations": turns}
