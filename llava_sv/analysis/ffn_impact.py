"""`llava-sv analyze ffn-impact` (the paper's Figure 3): how much each layer's FFN changes a token, by the token's role.

A checkpoint and pictures arrive; per layer and role, three measures of each token leave. With h the residual stream
after attention, `h = x + Attention(norm(x))` (equation 5's h_attn), and f = FFN(norm(h)), what the FFN adds to it:

- `update`, ||f|| / ||h||: Figure 3's feature modulus ratio, of the FFN's output to what goes in;
- `growth`, ||h + f|| / ||h||: the token's length after the FFN over its length before;
- `turn`, 1 - cos(h, h + f): 0 where the direction stays, 1 at a right angle, 2 where it is reversed.

Norms are Euclidean, over the C channels of one token, in float32. A skipped token of a layer that skips has no f in the
model; it is computed on the side, from the model's own h, and the forward goes on without it: what the FFN would have
added there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_sv.analysis.common import Job, Results, make_parser, open_job
from llava_sv.analysis.plots import COLOURS, figure, whole_numbers
from llava_sv.analysis.streaming import QUANTILES, Running
from llava_sv.analysis.trajectory import LAYER_INPUTS
from llava_sv.model.token_groups import TokenRole

GROUPS: dict[str, tuple[TokenRole, ...]] = {
    "text": (TokenRole.TEXT,),
    "visual": (TokenRole.RETAINED, TokenRole.FINE, TokenRole.SKIPPED),
    "retained": (TokenRole.RETAINED,),
    "fine": (TokenRole.FINE,),
    "summary": (TokenRole.SUMMARY,),
    "skipped": (TokenRole.SKIPPED,),
}
"""`visual`: all that came from patches, whatever became of them. In a dense checkpoint these are `retained`."""

EDGES: dict[str, np.ndarray] = {
    "update": np.concatenate([[0.0], np.logspace(-6, 6, 1201)]),
    "growth": np.concatenate([[0.0], np.logspace(-6, 6, 1201)]),
    "turn": np.concatenate([[0.0], np.logspace(-6, np.log10(2.0), 640)]),
}
"""Bins of each measure: a hundred a decade, so that a quantile is within 2.4% of the value it stands for."""

TITLES = {
    "update": "FFN's output over its input\n||FFN(h)|| / ||h||",
    "growth": "length after over before\n||h + FFN(h)|| / ||h||",
    "turn": "change of direction\n1 - cos(h, h + FFN(h))",
}

Table = dict[str, dict[str, list[Running]]]
"""Measure -> group -> one `Running` a layer."""


def measures(hidden: Tensor, update: Tensor) -> dict[str, Tensor]:
    """hidden h and update f, [T, C] -> the three measures, each [T] (see the head of this file)."""
    h, f = hidden.float(), update.float()
    after = h + f
    lengths = h.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    turn = 1.0 - torch.nn.functional.cosine_similarity(h, after, dim=-1)
    return {"update": f.norm(dim=-1) / lengths, "growth": after.norm(dim=-1) / lengths, "turn": turn.clamp(0.0, 2.0)}


@contextmanager
def watching(layers: Any, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """While this lasts, each decoder layer's input is also run through its attention and FFN on the side.

    see: called with (layer, h [T, C], f [T, C]) of every token, before the layer runs. The layer's own work is not
    touched, whatever rows it leaves out.
    """

    def hook_of(index: int) -> Callable[..., None]:
        def hook(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            given = {name: kwargs[name] for name in LAYER_INPUTS if name in kwargs}
            attended, _ = layer.self_attn(layer.input_layernorm(x), past_key_values=None, **given)
            hidden = x + attended
            see(index, hidden[0], layer.mlp(layer.post_attention_layernorm(hidden))[0])

        return hook

    handles = [layer.register_forward_pre_hook(hook_of(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect(job: Job) -> Table:
    """Every picture's tokens, added up picture by picture."""
    model, layers = job.model, job.model.get_model().layers
    table: Table = {
        name: {group: [Running(edges) for _ in layers] for group in GROUPS} for name, edges in EDGES.items()
    }
    for sample in job.samples("FFN impact"):
        batch = job.splice(sample)
        roles = batch.token_roles[0].cpu()
        masks = {
            group: torch.isin(roles, torch.tensor([int(role) for role in members], dtype=roles.dtype)).numpy()
            for group, members in GROUPS.items()
        }

        def see(layer: int, hidden: Tensor, update: Tensor, masks: dict[str, np.ndarray] = masks) -> None:
            for name, values in measures(hidden, update).items():
                array = values.cpu().numpy()
                for group, mask in masks.items():
                    table[name][group][layer].add(array[mask])

        with watching(layers, see):
            model(
                inputs_embeds=batch.inputs_embeds,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                token_roles=batch.token_roles,
                use_cache=False,
                logits_to_keep=1,
            )
    return table


def arrays_of(table: Table) -> dict[str, np.ndarray]:
    """The .npz: of each measure `NAME_mean`, `NAME_deviation` [G, L], `NAME_quantiles` [G, L, Q] and `NAME_bins`
    [G, L, K] with `NAME_edges` [K + 1]; `groups` [G], `quantiles` [Q], `count` [G, L]."""
    arrays: dict[str, np.ndarray] = {"groups": np.array(list(GROUPS)), "quantiles": np.array(QUANTILES)}
    for name, by_group in table.items():
        rows = by_group.values()
        arrays[f"{name}_mean"] = np.array([[one.mean for one in row] for row in rows])
        arrays[f"{name}_deviation"] = np.array([[one.deviation for one in row] for row in rows])
        arrays[f"{name}_quantiles"] = np.array([[[one.quantile(q) for q in QUANTILES] for one in row] for row in rows])
        arrays[f"{name}_bins"] = np.array([[one.bins for one in row] for row in rows])
        arrays[f"{name}_edges"] = EDGES[name]
        arrays["count"] = np.array([[one.count for one in row] for row in rows])
    return arrays


def numbers_of(table: Table, job: Job) -> dict[str, Any]:
    """The .json: facts; layers that skip; of each measure and group that has tokens, one entry a layer."""
    layers = job.model.get_model().layers
    skipping = [i for i, layer in enumerate(layers) if layer.skips] if job.model.config.skip_vision else []
    return {
        **job.facts(),
        "skipping_layers": skipping,
        "skipped_is": "in skipping layers, what the FFN would have added; it is not in the forward",
        "measures": {
            name: {
                group: [one.numbers() for one in runs] for group, runs in by_group.items() if any(r.count for r in runs)
            }
            for name, by_group in table.items()
        },
    }


def shown_groups(table: Table) -> list[str]:
    """Groups that are drawn: those with tokens; `visual` only where it is not split into roles."""
    there = [group for group, runs in table["update"].items() if any(run.count for run in runs)]
    split = any(group in there for group in ("fine", "skipped"))
    return [group for group in there if group != ("visual" if split else "retained")]


def draw(table: Table, title: str) -> Any:
    """One panel a measure: medians by layer, with the middle half of the tokens shaded."""
    made, axes = figure(columns=3, width=12.0, height=4.2)
    for axis, (name, by_group) in zip(axes[0], table.items()):
        for group in shown_groups(table):
            runs = by_group[group]
            layers = np.arange(len(runs))
            low, middle, high = (np.array([run.quantile(q) for run in runs]) for q in (0.25, 0.5, 0.75))
            style = "--" if group == "skipped" else "-"
            axis.fill_between(layers, low, high, color=COLOURS[group], alpha=0.18, linewidth=0)
            axis.plot(layers, middle, style, color=COLOURS[group], marker="o", markersize=4, label=group)
        axis.set_yscale("log")
        axis.grid(axis="y", which="major", alpha=0.3)
        axis.set_title(TITLES[name], fontsize=10)
        axis.set_xlabel("layer")
        whole_numbers(axis)
    handles, labels = axes[0][0].get_legend_handles_labels()
    labels = ["skipped (would have been)" if label == "skipped" else label for label in labels]
    made.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    made.suptitle(title, fontsize=11)
    return made


def main(argv: list[str]) -> int:
    """`llava-sv analyze ffn-impact ...`."""
    parser = make_parser(
        "ffn-impact",
        "How much each layer's FFN changes text, retained, summary and skipped tokens (Figure 3).",
        "llava-sv analyze ffn-impact --model-path checkpoints/tiny-skip --image-folder playground/data/toy/images",
    )
    args = parser.parse_args(argv)
    results = Results(args.output, "ffn-impact", args.overwrite)
    job = open_job(args)
    table = collect(job)
    numbers = numbers_of(table, job)
    title = f"What the FFN does to a token: median and middle half, {numbers['images']} pictures"
    results.save(arrays_of(table), numbers, lambda: draw(table, title))
    print(render(table))
    return 0


def render(table: Table) -> str:
    """Medians of `update` for a terminal."""
    groups = shown_groups(table)
    lines = ["median ||FFN(h)|| / ||h||", f"{'layer':<6}" + "".join(f"{group:>10}" for group in groups)]
    for layer in range(len(table["update"]["text"])):
        medians = (table["update"][group][layer].quantile(0.5) for group in groups)
        lines.append(f"{layer:<6}" + "".join(f"{value:>10.3f}" for value in medians))
    return "\n".join(lines)
