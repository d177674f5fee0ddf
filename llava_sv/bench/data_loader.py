"""Images a second and core: through the data set that training reads, and through a plain PIL loop, in turn.

Called by `bench.data_measure`. Both make the same pixels of the same JPEG files: RGB, padded to a square, 336 x 336,
normalised, float32. Training's side does more: records, conversation to ids and labels, the collated batch. Seconds
are those of the process' CPU, on one thread: other work on the machine hardly touches them.
"""

from __future__ import annotations

import json
import statistics
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llava_sv.bench.data_records import write_pictures, write_records
from llava_sv.conversation import get_template
from llava_sv.data.collator import DataCollatorForSupervisedDataset
from llava_sv.data.dataset import LazySupervisedDataset
from llava_sv.data.index import open_index
from llava_sv.mm_utils import clip_image_processor_class

PICTURES = 128
ROUNDS = 5
BATCH = 16
SIDE = 336
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
"""CLIP's."""


def measure_loader(folder: Path, seed: int) -> dict[str, Any]:
    """`loader_images_per_second`, `pil_images_per_second`, and the median over rounds of their ratio."""
    torch.set_num_threads(1)
    write_pictures(folder, PICTURES, seed)
    dataset = make_dataset(folder, seed)
    paths = [folder / image for record in dataset.records for image in record.images]
    ours, plain = [], []
    _through_training(dataset), _through_pil(paths)  # what is only done once is done
    for _ in range(ROUNDS):
        ours.append(PICTURES / _seconds(lambda: _through_training(dataset)))
        plain.append(PICTURES / _seconds(lambda: _through_pil(paths)))
    return {
        "loader_images_per_second": statistics.median(ours),
        "pil_images_per_second": statistics.median(plain),
        "loader_ratio": statistics.median(a / b for a, b in zip(ours, plain)),
    }


def _seconds(run: Callable[[], int]) -> float:
    began = time.process_time()
    assert run() == PICTURES
    return time.process_time() - began


def _through_training(dataset: LazySupervisedDataset) -> int:
    collate = DataCollatorForSupervisedDataset(dataset.tokenizer)
    return sum(len(batch["images"]) for batch in DataLoader(dataset, batch_size=BATCH, collate_fn=collate))


def _through_pil(paths: list[Path]) -> int:
    return sum(len([plain_pixels(path) for path in paths[at : at + BATCH]]) for at in range(0, len(paths), BATCH))


def plain_pixels(path: Path) -> torch.Tensor:
    """[3, 336, 336] float32, by Pillow and numpy alone."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in MEAN.tolist()))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    small = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    pixels = (small / 255 - MEAN) / STD
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def make_dataset(folder: Path, seed: int) -> LazySupervisedDataset:
    """`PICTURES` of the synthetic records, each with one picture of `folder`."""
    made = folder / "made.json"
    write_records(made, 2 * PICTURES, seed, quiet=True)
    records = [record for record in json.loads(made.read_text(encoding="utf-8")) if "image" in record][:PICTURES]
    for number, record in enumerate(records):
        record["image"] = f"{number:012d}.jpg"
    made.write_text(json.dumps(records), encoding="utf-8")
    processor = clip_image_processor_class()(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )  # fmt: skip
    flags = types.SimpleNamespace(
        image_folder=str(folder), missing_images="error", is_multimodal=True, image_aspect_ratio="pad"
    )
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    opened = open_index(made, folder / "cache")
    return LazySupervisedDataset(opened, _tokenizer(texts), processor, flags, get_template("llama_3"))


def _tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE of LLaMA-3's kind, learnt from the texts at hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    markers = [begin, end, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|pad|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=markers, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=begin, eos_token=end, pad_token="<|pad|>")
