"""One checkpoint at another token budget than it was trained with: checked, put into the loaded model, and counted.

Called by `tradeoff` and `trajectory`. Nothing is trained, and no weight changes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from llava_sv.bench.checkpoint import budget_of, llm_of, setting_of
from llava_sv.bench.exact import Tokens, llm_flops, skipping_tokens, vision_flops
from llava_sv.errors import UserError
from llava_sv.model.compression.summary import SummaryTokens
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.loading import check_config
from llava_sv.model.retained_budget import over
from llava_sv.tiling import ANYRES, Size

DENSE = "dense"


@dataclass(frozen=True)
class Asked:
    """A budget of `--budgets`. Both None: dense, every visual token kept and through every FFN."""

    retained: int | None = None
    skipped: int | None = None

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        return DENSE if self.retained is None else f"{self.retained}/{self.skipped}"


def parse_budgets(text: str) -> list[Asked]:
    """`"8/8,16/20,dense"` -> budgets in that order. Raises `UserError` for what cannot be read, or is there twice."""
    budgets = []
    for part in map(str.strip, text.split(",")):
        retained, slash, skipped = part.partition("/")
        if part == DENSE:
            budgets.append(Asked())
        elif slash and retained.isdecimal() and skipped.isdecimal() and int(retained) and int(skipped):
            budgets.append(Asked(int(retained), int(skipped)))
        else:
            raise UserError(
                f"--budgets: cannot read {part!r}; write RETAINED/SKIPPED, both 1 or more, or {DENSE}, such as "
                f"8/8,16/20,{DENSE}"
            )
    if len(set(budgets)) < len(budgets):
        twice = next(budget.name for budget in budgets if budgets.count(budget) > 1)
        raise UserError(f"--budgets: {twice} is there twice; drop one")
    return budgets


def config_at(config: Any, budget: Asked) -> Any:
    """A copy of `config` (its encoder described) with this budget; the checkpoint's other switches stay.

    A dense checkpoint gets the default switches. Raises `UserError` for a budget that the family cannot give.
    """
    made = copy.copy(config)
    try:
        if budget.retained is None:
            made.skip_vision = None
            if config.skip_vision is not None and config.image_aspect_ratio == ANYRES:
                raise UserError("this checkpoint skips with anyres tiles, and has no newline for dense ones; drop it")
        else:
            block = config.skip_vision.to_dict() if config.skip_vision else {}
            if not block.get("merge", True):
                raise UserError("this checkpoint skips without merging, all that is not retained; drop it")
            given = {"num_retained": budget.retained, "num_skipped": budget.skipped}
            made.skip_vision = SkipVisionConfig.from_dict(over(block, given))
        check_config(made, made.vision_config)
    except UserError as error:
        raise UserError(f"--budgets {budget.name}: {error}") from error
    return made


def put_in(model: Any, skip: SkipVisionConfig | None) -> None:
    """Let the loaded model work with `skip` from here on. Summaries that it has no weights for start as a plain mean,
    as fine-tuning starts them."""
    config, projector = model.config, model.get_model().mm_projector
    config.skip_vision = skip
    projector.skip = skip
    chosen = skip.layers_that_skip(config.num_hidden_layers) if skip else []
    for index, layer in enumerate(model.get_model().layers):
        layer.skips = index in chosen
    if skip is not None and projector.summary is None:
        summary = SummaryTokens(config.hidden_size, skip.former_summary, skip.latter_summary, skip.summary_norm)
        projector.summary = summary.to(next(model.get_model().layers[0].parameters())).eval()


def image_tokens(config: Any, size: Size | None) -> Tokens:
    """What one image of `size` (None: any, of families where it does not matter) lays into the sequence."""
    if config.skip_vision is None:
        return Tokens(0, config.dense_tokens_per_image(size))
    return skipping_tokens(0, budget_of(config, size))


def prefill_flops(config: Any, text: int, sizes: tuple[Size | None, ...]) -> float:
    """Exact FLOPs of one prompt of `text` tokens and images of these sizes, from pixels to one position's logits."""
    llm, images = llm_of(config), [image_tokens(config, size) for size in sizes]
    skipping = len(config.skip_vision.layers_that_skip(config.num_hidden_layers)) if config.skip_vision else None
    before = (vision_flops(setting_of(config, size), tokens, llm.hidden_size) for size, tokens in zip(sizes, images))
    retained, skipped, summaries = (
        sum(getattr(tokens, name) for tokens in images) for name in ("retained", "skipped", "summaries")
    )
    parts = [*before, llm_flops(llm, Tokens(text, retained, skipped, summaries), 1, skipping)]
    return sum(sum(part.values()) for part in parts)
