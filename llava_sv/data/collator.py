"""Samples, or packs of them -> a batch, right-padded. The DataLoader calls it in its workers.

B samples, T tokens of the longest, an image being one mark; H, W pixels of the encoder's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_sv.constants import IGNORE_INDEX
from llava_sv.errors import UserError


@dataclass
class DataCollatorForSupervisedDataset:
    """See `__call__`. Raises `UserError` for a tokenizer without a pad token."""

    tokenizer: Any
    with_ids: bool = False
    """Add `ids`, the records' ids."""

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name_or_path!r} has no pad token; set tokenizer.pad_token to one that "
                f"never occurs in text"
            )

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """input_ids [B, T] padded with the pad token, labels [B, T], attention_mask bool [B, T]; images: tensors
        [3, H, W] of all samples in order of their marks (an empty list without any); image_sizes: (width, height)s.

        Of packs (lists of samples) B is the number of samples of all together, and `packs` says how many each has.
        """
        packs = [len(pack) for pack in samples] if isinstance(samples[0], list) else None
        if packs is not None:
            samples = [sample for pack in samples for sample in pack]
        pad = self.tokenizer.pad_token_id
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch: dict[str, Any] = {
            "input_ids": pad_sequence([s["input_ids"] for s in samples], batch_first=True, padding_value=pad),
            "labels": pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": torch.arange(int(lengths.max()))[None, :] < lengths[:, None],
            "images": [image for sample in samples for image in sample["images"]],
            "image_sizes": [size for sample in samples for size in sample["image_sizes"]],
        }
        if packs is not None:
            batch["packs"] = packs
        if self.with_ids:
            batch["ids"] = [sample["id"] for sample in samples]
        return batch
