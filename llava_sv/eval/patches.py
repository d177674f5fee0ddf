"""Which patches of an image a checkpoint retains, merges and skips: computed by the model's own functions, then drawn.

`patch_plan` (a skipping checkpoint and an image in, a `PatchPlan` out) and `draw` (a `PatchPlan` in, a PNG out) are
called by the report. N patches on a grid of `side` x `side`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava_sv.errors import UserError
from llava_sv.files import replacing
from llava_sv.generation import Assistant
from llava_sv.mm_utils import process_images
from llava_sv.model.compression.adaptive import choose_counts
from llava_sv.model.compression.merge import plan_merge
from llava_sv.model.compression.select import gather_tokens, get_selector, split_by_score, wants_of

COLOURS = {"retained": "#2ca02c", "kept": "#ff7f0e", "merged": "#7f7f7f"}
"""Of the frames: retained; skipped and kept; skipped and merged into a kept one."""


@dataclass(frozen=True)
class PatchPlan:
    """pixels: [S, S, 3] in 0..1, the picture as the encoder sees it. The rest are patch numbers in raster order."""

    pixels: np.ndarray
    side: int
    retained: list[int]
    """Nr patches that pass through every layer whole."""
    kept: list[int]
    """Ns patches that stand for themselves and those merged into them; they skip the FFN."""
    merged_into: dict[int, int]
    """Every other patch -> the kept patch that it was averaged into."""


@torch.inference_mode()
def patch_plan(assistant: Assistant, image: Image.Image) -> PatchPlan:
    """The plan of one image. `UserError` for a checkpoint that skips nothing, or whose family this cannot draw."""
    config = assistant.model.config
    skip = config.skip_vision
    if skip is None or config.mm_family != "llava":
        raise UserError("the picture of patches needs a skipping checkpoint of the family 'llava'")
    pixels = process_images([image], assistant.image_processor, config)[0]
    tower = assistant.model.get_vision_tower()
    features = tower(pixels.unsqueeze(0), **wants_of(skip.selection))
    scores = get_selector(skip.selection)(features)
    if skip.adaptive:
        skip = skip.at(int(choose_counts(scores, skip)))
    retained, rest = split_by_score(scores, skip.mean_retained)
    rest_list = rest[0].tolist()
    kept, merged_into = rest_list, {}
    if skip.merge:
        tokens = gather_tokens(assistant.model.get_model().mm_projector.project(features.patches), rest)
        plan = plan_merge(tokens, skip.num_skipped)
        kept = [rest_list[i] for i in plan.kept[0].tolist()]
        joins = {patch: kept[slot] for patch, slot in zip(rest_list, plan.target[0].tolist())}
        merged_into = {patch: target for patch, target in joins.items() if patch != target}
    return PatchPlan(shown(pixels, assistant), tower.num_patches_per_side, retained[0].tolist(), kept, merged_into)


def shown(pixels: torch.Tensor, assistant: Assistant) -> np.ndarray:
    """Undo the processor's normalisation: [3, S, S] -> [S, S, 3] in 0..1."""
    processor = assistant.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return (pixels.float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def draw(plan: PatchPlan, path: str | Path, title: str = "") -> None:
    """Write the picture: the image beside its patches, each merged patch tied to the one it joined."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    cell = plan.pixels.shape[0] / plan.side
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.6), layout="constrained")
    left.imshow(plan.pixels)
    left.set_title("the image, as the encoder sees it")
    right.imshow(_faded(plan, cell))
    groups = {"retained": plan.retained, "kept": plan.kept, "merged": list(plan.merged_into)}
    for name, patches in groups.items():
        for patch in patches:
            row, column = divmod(patch, plan.side)
            corner = (column * cell - 0.5 + cell * 0.06, row * cell - 0.5 + cell * 0.06)
            width = 0.8 if name == "merged" else 2.2
            box = plt.Rectangle(corner, cell * 0.88, cell * 0.88, fill=False, lw=width, ec=COLOURS[name])
            right.add_patch(box)
    for patch, target in plan.merged_into.items():
        (row, column), (to_row, to_column) = divmod(patch, plan.side), divmod(target, plan.side)
        xs, ys = [(column + 0.5) * cell, (to_column + 0.5) * cell], [(row + 0.5) * cell, (to_row + 0.5) * cell]
        right.plot(xs, ys, color=COLOURS["merged"], lw=0.8)
        right.plot(xs[1], ys[1], "o", color=COLOURS["kept"], ms=4)
    right.set_title(title or "what the language model gets")
    labels = {
        "retained": f"retained: {len(plan.retained)} (attention and FFN)",
        "kept": f"skipped: {len(plan.kept)} (attention only)",
        "merged": f"merged: {len(plan.merged_into)} (averaged into a skipped one)",
    }
    handles = [Patch(fill=False, ec=COLOURS[name], lw=2, label=label) for name, label in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    for axes in (left, right):
        axes.set_axis_off()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def _faded(plan: PatchPlan, cell: float) -> np.ndarray:
    """The image with skipped patches half faded and merged ones almost white."""
    shown = plan.pixels.copy()
    strength = {**dict.fromkeys(plan.kept, 0.35), **dict.fromkeys(plan.merged_into, 0.75)}
    for patch, share in strength.items():
        row, column = divmod(patch, plan.side)
        rows, columns = (slice(round(i * cell), round((i + 1) * cell)) for i in (row, column))
        shown[rows, columns] = shown[rows, columns] * (1 - share) + share
    return shown
