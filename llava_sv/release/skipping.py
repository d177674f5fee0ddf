"""A dense plan made to skip, and a skipping one made dense: what changes in config.json and which weights come or go.

A model that is made to skip answers training-free as the paper's method lets it, and is what fine-tuning starts from.
Called by converting.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llava_sv.errors import UserError
from llava_sv.model.compression.summary import SummaryTokens
from llava_sv.model.llava_layout import OUR_NEWLINE
from llava_sv.model.loading import check_config
from llava_sv.model.token_counts import count_tokens, with_family_budget
from llava_sv.release.check_plan import config_of
from llava_sv.release.plan import Plan
from llava_sv.release.weights import Entry
from llava_sv.tiling import ANYRES

PROJECTOR = "model.mm_projector."
SUMMARY = f"{PROJECTOR}summary."


def make_skipping(plan: Plan, skip_vision: dict[str, Any]) -> Plan:
    """A dense plan with Skip-Vision in it; the plan itself stays as it is.

    skip_vision: fields of `SkipVisionConfig`; what it leaves out takes the family's own budget, then the defaults.
    Summary weights are new, as in training that starts from a dense model: zeros, which is a plain mean. Raises
    `UserError` for a budget that the encoder's patches do not hold, and for a plan that skips already.
    """
    if plan.config.get("skip_vision") is not None:
        raise UserError(f"checkpoint {plan.source}: skips already (skip_vision in its config.json); drop --sv_* flags")
    config = config_of(plan)
    try:
        config.skip_vision = with_family_budget(config, skip_vision)
        check_config(config, plan.config["vision_config"])
    except UserError as error:
        raise UserError(f"checkpoint {plan.source}: {error}") from error
    skip = config.skip_vision
    entries = [entry for entry in plan.entries if entry.name != OUR_NEWLINE]
    dropped = len(plan.entries) - len(entries)
    own = [i for i, entry in enumerate(entries) if entry.name.startswith(PROJECTOR)]
    beside = entries[own[-1] if own else -1]  # identity projectors have no weights
    fresh = SummaryTokens(config.hidden_size, skip.former_summary, skip.latter_summary, skip.summary_norm)
    new = [_held(SUMMARY + name, value.to(beside.dtype), beside.file) for name, value in fresh.state_dict().items()]
    after = entries.index(beside) + 1
    made = replace(plan, config={**plan.config, "skip_vision": skip.to_dict()})
    made.entries = [*entries[:after], *new, *entries[after:]]
    counts, dense = count_tokens(config), config.dense_tokens_per_image()
    made.notes = [
        *plan.notes,
        f"made to skip: of {dense:,} visual tokens an image {counts.retained:,} are retained and {counts.skipped:,} "
        f"skipped after merging; {len(new)} summary weights are new (a plain mean until they are trained)",
    ]
    if dropped:
        made.notes.append(f"{OUR_NEWLINE} dropped: with skipping, rows of tiles have no end of their own")
    return made


def drop_skipping(plan: Plan) -> Plan:
    """A skipping plan without Skip-Vision: dense, its summary weights gone. A dense plan is returned as it is.

    Dense `anyres` ends each row of tiles with a weight that a skipping model lacks: it is new then, and said.
    """
    if plan.config.get("skip_vision") is None:
        return plan
    made = replace(plan, config={**plan.config, "skip_vision": None})
    made.entries = [entry for entry in plan.entries if not entry.name.startswith(SUMMARY)]
    gone = len(plan.entries) - len(made.entries)
    made.notes = [*plan.notes, f"skipping dropped: the model is dense now; {gone} summary weights are left out"]
    if plan.config.get("mm_family") == "llava_hd" and plan.config.get("image_aspect_ratio") == ANYRES:
        beside = next(entry for entry in reversed(made.entries) if entry.name.startswith(PROJECTOR))
        width = int(plan.config["hidden_size"])
        made.entries.append(_held(OUR_NEWLINE, fresh_newline(width).to(beside.dtype), beside.file))
        made.notes.append(f"{OUR_NEWLINE} is new: train it, or expect worse answers")
    return made


def fresh_newline(width: int) -> Tensor:
    """LLaVA-NeXT's initial row end, [C]; the same numbers each time."""
    return torch.randn(width, generator=torch.Generator().manual_seed(0)) * width**-0.5


def _held(name: str, value: Tensor, file: str) -> Entry:
    value = value.detach().clone()
    return Entry(name, tuple(value.shape), value.dtype, file, lambda: value)
