"""The `<image>` token, which transformers' models need and this project's do without: added, and taken away again.

Called by to_hf and from_hf. As in transformers' own conversion, embedding and head grow to a multiple of 64 rows; the
new rows are the mean of the old ones. C width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken

from llava_sv.constants import DEFAULT_IMAGE_TOKEN
from llava_sv.errors import UserError
from llava_sv.model.builders.tokenizer import read_tokenizer
from llava_sv.release import kept
from llava_sv.release.plan import Plan
from llava_sv.release.weights import Entry

ROWS_OF_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")
MULTIPLE = 64
CHUNK = 8192


def with_image_token(plan: Plan) -> tuple[Plan, dict[str, Any] | None]:
    """(A plan whose vocabulary has `<image>`, what was done to have it or None).

    A token that the tokenizer has, and that the embedding has a row for, is taken as it is.
    """
    rows = int(plan.config["vocab_size"])
    known = plan.tokenizer.get_vocab().get(DEFAULT_IMAGE_TOKEN)
    if known is not None and known < rows:
        return plan, None
    tokenizer = plan.tokenizer
    if known is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    token = int(tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN))
    grown = -(-max(rows, token + 1) // MULTIPLE) * MULTIPLE if token >= rows else rows
    entries = [grow(one, grown) if one.name in ROWS_OF_TOKENS else one for one in plan.entries]
    note = f"tokens: {DEFAULT_IMAGE_TOKEN} added as {token}"
    if grown > rows:
        note += f"; the vocabulary grew from {rows} to {grown} rows (a multiple of {MULTIPLE}), each the mean of all"
    done = {
        "token": token,
        "rows": rows,
        "grown": grown,
        "tokenizer": kept.tokenizer_print(tokenizer),
    }
    made = replace(
        plan,
        config={**plan.config, "vocab_size": grown},
        entries=entries,
        tokenizer=tokenizer,
        notes=[*plan.notes, note],
    )
    return made, done


def without_image_token(plan: Plan) -> None:
    """Undo in a plan what `with_image_token` once did to its source, where tokenizer and vocabulary are still those
    that it left; else leave everything."""
    done = kept.record(plan.source).get("image_token")
    if not isinstance(done, dict) or plan.config["vocab_size"] != done.get("grown"):
        return
    if kept.tokenizer_print(plan.tokenizer) != done.get("tokenizer"):
        return
    before = _tokenizer_before(plan.source)
    if before is None:
        return
    plan.tokenizer = before
    plan.config["vocab_size"] = done["rows"]
    plan.entries = [cut(one, done["rows"]) if one.name in ROWS_OF_TOKENS else one for one in plan.entries]
    if done["grown"] > done["rows"]:
        plan.notes.append(
            f"tokens: {DEFAULT_IMAGE_TOKEN}, which a conversion had added, is gone; "
            f"{done['rows']} of {done['grown']} rows are left"
        )


def _tokenizer_before(source: Path) -> Any:
    with kept.tokenizer_before(source) as folder:
        if folder is None:
            return None
        try:
            return read_tokenizer(str(folder))
        except UserError:
            return None


def grow(entry: Entry, rows: int) -> Entry:
    """[n, C] -> [rows, C]; the new rows are the mean of the old ones."""
    old = entry.load

    def load() -> Tensor:
        value = old()
        total = torch.zeros(value.shape[1], dtype=torch.float64)
        for part in value.split(CHUNK):
            total += part.double().sum(0)
        mean = (total / value.shape[0]).to(value.dtype)
        return torch.cat([value, mean.expand(rows - value.shape[0], -1)])

    return entry if entry.shape[0] == rows else replace(entry, shape=(rows, *entry.shape[1:]), load=load)


def cut(entry: Entry, rows: int) -> Entry:
    """[n, C] -> its first `rows` rows."""
    old = entry.load
    return replace(entry, shape=(rows, *entry.shape[1:]), load=lambda: old()[:rows].clone())
