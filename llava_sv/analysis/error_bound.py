"""`llava-sv analyze error-bound`: the error of skipping the FFN, layer by layer, against the bounds of section 5, on
any checkpoint and pictures; docs/Theory.md says what each number means and which bounds are proved."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_sv.analysis.bounds import DOMAIN, MEANING, PROVED, Arrays, Check, Head, bounds_of, checks_of, gains_of
from llava_sv.analysis.common import Job, Results, finite_mean, make_parser
from llava_sv.analysis.divergence import Plan, measure, similarity_error
from llava_sv.analysis.error_bound_figure import draw
from llava_sv.analysis.lipschitz import LayerNorms, head_norms, norms_of
from llava_sv.analysis.trajectory import add_budget_flags, open_skipping, parse_layers, walk_of
from llava_sv.bench.sizes import known_words
from llava_sv.errors import UserError

GAINS = ("secant", "spectral", "jvp")

EXAMPLE = "llava-sv analyze error-bound --model-path checkpoints/tiny-skip --image-folder playground/data/toy/images"


def make_arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser("error-bound", __doc__ or "", EXAMPLE)
    add_budget_flags(parser)
    parser.add_argument("--skip-layers", help="layers that skip: all, 8-31 or 0,4,8-15 (default: the checkpoint's)")
    parser.add_argument(
        "--gains", default=",".join(GAINS), help="how gamma is measured, of secant (always), spectral (operator norms; "
        "heavy once), jvp (local gains; heavy for each picture) (default: all)",
    )  # fmt: skip
    parser.add_argument("--power-iterations", type=int, default=20, help="of every power iteration (default 20)")
    parser.add_argument("--sigma", type=float, help="sigma of (12) (default: standard deviation of the full logits)")
    return parser


def check_arguments(args: argparse.Namespace) -> list[str]:
    """The gains asked for; `UserError` for values without sense."""
    gains = known_words("--gains", args.gains, GAINS)
    if args.power_iterations < 1:
        raise UserError(f"--power-iterations {args.power_iterations}: must be 1 or more")
    if args.sigma is not None and not (args.sigma > 0 and math.isfinite(args.sigma)):
        raise UserError(f"--sigma {args.sigma}: must be above 0")
    return gains


def layers_of(job: Job, args: argparse.Namespace) -> list[int]:
    """Layers that skip; `UserError` where none does."""
    config = job.model.config
    if args.skip_layers is not None:
        return parse_layers("--skip-layers", args.skip_layers, config.num_hidden_layers)
    layers = config.skip_vision.layers_that_skip(config.num_hidden_layers)
    if not layers:
        raise UserError(f"--model-path {args.model_path}: no layer of this checkpoint skips; say which, --skip-layers")
    return layers


def stack(rows: list[Arrays]) -> Arrays:
    """One array a name, pictures first."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def tally(checks: list[dict[str, Check]]) -> dict[str, dict[str, Any]]:
    """Per inequality: on how many pictures it held, whether it is proved, and log10 of bound over measured (largest,
    middle, smallest over pictures, at the end of the sequence of layers)."""
    table = {}
    for name in checks[0]:
        found = [check[name] for check in checks]
        slack = np.array([np.ravel(check.slack)[-1] for check in found])
        slack = slack[np.isfinite(slack)]
        table[name] = {
            "is": found[0].equation,
            "proved": found[0].proved,
            "holds": sum(check.holds for check in found),
            "of": len(found),
            "log10_bound_over_measured": dict(
                zip(("min", "median", "max"), np.quantile(slack, (0, 0.5, 1)).tolist() if len(slack) else [None] * 3)
            ),
        }
    return table


def statement(table: dict[str, dict[str, Any]]) -> str:
    """Whether all that is proved holds, and what else does not."""
    broken, failing = ([name for name, row in table.items() if row["proved"] is sure and row["holds"] < row["of"]]
                       for sure in (True, False))  # fmt: skip
    pictures = next(iter(table.values()))["of"]
    if broken:
        return f"PROVED BOUNDS FAIL, which is an error of this code: {', '.join(broken)}."
    proved = sum(row["proved"] for row in table.values())
    others = f"not on all: {', '.join(failing)}" if failing else "all of them hold here too"
    unproved = f"Of the {len(table) - proved} not proved: {others}."
    return f"All {proved} proved bounds hold on all {pictures} pictures. {unproved}"


def as_table(table: dict[str, dict[str, Any]]) -> str:
    """The inequalities for a screen: where each holds, and how loose it is."""
    lines = [f"{'bound':<24}{'proved':<8}{'holds on':<12}{'bound/measured':<16}what"]
    for name, row in table.items():
        middle = row["log10_bound_over_measured"]["median"]
        loose = "-" if middle is None else f"10^{middle:.2f}"
        sure = "yes" if row["proved"] else "no"
        lines.append(f"{name:<24}{sure:<8}{row['holds']} of {row['of']:<7}{loose:<16}{row['is']}")
    return "\n".join(lines)


def summarise(measured: Arrays, bounds: Arrays, gains: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means over pictures, [L] or [L + 1] a layer, logarithms as log10."""
    with np.errstate(all="ignore"):
        plain_names = [name for name in measured if not name.startswith("gain_")]
        means = {name: finite_mean(measured[name]) for name in plain_names}
        gammas = {
            kind: {"mean_by_layer": finite_mean(np.exp(value)), "max": _largest(np.exp(value))}
            for kind, value in gains.items()
        }
        logs = {name: finite_mean(value / np.log(10)) for name, value in bounds.items()}
        ratios = {
            name.removeprefix("error/"): finite_mean((value - np.log(measured["error"])) / np.log(10))
            for name, value in bounds.items()
            if name.startswith("error/")
        }
    return {"measured": means, "gamma": gammas, "log10_bound": logs, "log10_bound_over_measured_by_layer": ratios}


def _largest(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None


def matrix_norms(norms: list[LayerNorms], head_dim: int) -> list[dict[str, Any]]:
    """Spectral norms by layer, and Theorem 5.1's products."""
    return [
        {"power": layer.power, "upper": layer.upper, "theorem_L_attn": pair[0], "theorem_L_ffn": pair[1]}
        for layer, pair in ((layer, layer.theorem(head_dim)) for layer in norms)
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write the three files, return what the JSON holds."""
    gains_asked = check_arguments(args)
    results = Results(args.output, "error-bound", args.overwrite)
    job = open_skipping(args)
    layers = layers_of(job, args)
    norms = None
    if "spectral" in gains_asked:
        decoder = tqdm(job.model.get_model().layers, desc="spectral norms", unit="layer")
        norms = [norms_of(layer, args.power_iterations) for layer in decoder]
    head = Head(*head_norms(job.model))
    plan = Plan(frozenset(layers), norms, args.power_iterations if "jvp" in gains_asked else 0, args.sigma)
    head_dim = job.model.get_model().layers[0].self_attn.head_dim

    rows, names, without = [], [], []
    for sample in job.samples("error-bound"):
        walk = walk_of(job, sample)
        if not bool(walk.skipped.any()):
            without.append(sample.name)
            continue
        found = measure(walk, plan) | similarity_error(job, sample, walk)
        gain = gains_of(found, norms, head_dim)
        rows.append((found, bounds_of(found, gain, head), gain))
        names.append(sample.name)
    if not names:
        raise UserError(f"--image-folder {args.image_folder}: in none of these pictures is a token skipped")

    table = tally([checks_of(found, bound) for found, bound, _ in rows])
    measured, bounds, gains = (stack([row[part] for row in rows]) for part in range(3))
    numbers = {
        **job.facts(),
        "layers_that_skip": layers,
        "pictures": names,
        "nothing_skipped_in": without,
        "gains": {kind: {"is": MEANING[kind], "holds_on": DOMAIN[kind], "proved": PROVED[kind]} for kind in gains},
        "sigma": "given" if args.sigma is not None else "standard deviation of the full logits over the vocabulary",
        "statement": statement(table),
        "checks": table,
        "spectral_norms": None if norms is None else matrix_norms(norms, head_dim),
        "head_norms": {"spectral": head.spectral, "range": head.range},
        **summarise(measured, bounds, gains),
    }
    arrays = measured | {f"log_bound/{name}": value for name, value in bounds.items()}
    arrays["pictures"] = np.array(names)
    results.save(arrays, numbers, lambda: draw(measured, bounds, gains))
    return numbers


def main(argv: list[str]) -> int:
    """Entry of the command."""
    numbers = run(make_arguments().parse_args(argv))
    print(as_table(numbers["checks"]), numbers["statement"], sep="\n\n")
    return 0
