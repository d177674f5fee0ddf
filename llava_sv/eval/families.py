"""Checkpoints of several families side by side: what `llava-sv eval` wrote in, report.json, report.md, report.png out.

`python -m llava_sv.eval.families` is called by hand or by a script after the evaluations. It names the best on fine
detail, and by how many points it leads the baseline, which is LLaVA without skipping. It measures nothing itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llava_sv.data.toy_questions import FINE_DETAIL
from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.files import read_json, replacing, write_json, write_text
from llava_sv.model.loading import read_config
from llava_sv.model.token_counts import count_tokens

EXAMPLE = """example:
  python -m llava_sv.eval.families --result llava=dense.json llava-skip=skip.json hd-skip=hd.json \\
      --flops llava-skip=skip-flops.json hd-skip=hd-flops.json --baseline llava --output playground/families"""
EVAL_COMMAND = "llava-sv eval --task toy --json FILE"
EVAL_FIELDS = ("model_path", "accuracy", "per_category", "questions", "chance")
COLOURS = {
    "llava": ("#1f4e8c", "#7fb0e6"),
    "llava_hd": ("#b35a00", "#f4b36b"),
    "cos": ("#2b7a3b", "#92d09f"),
}
"""Family -> colours of its dense and its skipping model in the chart."""
SPARE_COLOURS = ("#6a3d9a", "#c9aee0", "#8c564b", "#c49c94", "#7f7f7f", "#c7c7c7")
"""Of further models of the same kind."""


def named_paths(flag: str, values: list[str]) -> dict[str, Path]:
    """`["a=x.json"]` -> {"a": Path("x.json")}; `UserError` for one without `=`, or a name given twice."""
    paths: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise UserError(f"{flag} {value}: write NAME=FILE")
        if name in paths:
            raise UserError(f"{flag} {value}: the name {name!r} is given twice")
        paths[name] = Path(path)
    return paths


def _fields(path: Path, made_by: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of `path`; `UserError` unless it has all of `names`."""
    values = read_json(path, made_by)
    missing = [name for name in names if not isinstance(values, dict) or name not in values]
    if missing:
        raise UserError(f"{path}: no field {', '.join(missing)}; give the JSON that {made_by} writes")
    return values


def build_model(result: dict[str, Any], flops: Path | None) -> dict[str, Any]:
    """One entry of `models`: accuracies, seconds of training, tokens of the largest image, and costs where counted."""
    checkpoint = Path(result["model_path"])
    summary = _fields(checkpoint / "train_summary.json", "the checkpoint's training", ("train_seconds",))
    config = read_config(str(checkpoint))
    tokens = count_tokens(config)
    model = {
        "checkpoint": str(checkpoint),
        "family": config.mm_family,
        "skipping": config.skip_vision is not None,
        "accuracy": result["accuracy"],
        "per_category": result["per_category"],
        "train_seconds": summary["train_seconds"],
        "visual_tokens": {
            "total": tokens.total,
            "retained": tokens.retained,
            "skipped": tokens.skipped,
            "summaries": tokens.summaries,
        },
    }
    return model if flops is None else {**model, **_costs(flops, model)}


def _costs(path: Path, model: dict[str, Any]) -> dict[str, Any]:
    """What `llava-sv flops` counted: a prefill, and for a skipping model the ratios to the same family dense."""
    made_by = f"llava-sv flops --model-path {model['checkpoint']} --json FILE"
    counted = _fields(path, made_by, ("family", "paper_ratio", "exact_ratio", "dense", "skip"))
    if counted["family"] != model["family"]:
        raise UserError(f"{path}: counted for family {counted['family']!r}, but {model['checkpoint']} is of family "
                        f"{model['family']!r}; run {made_by}")  # fmt: skip
    prefill = counted["skip" if model["skipping"] else "dense"]["prefill"]["total"]
    ratios = {name: counted[name] for name in ("paper_ratio", "exact_ratio")} if model["skipping"] else {}
    return {**ratios, "prefill_flops": prefill}


def build(results: dict[str, Path], flops: dict[str, Path], baseline: str | None, seed: int | None) -> dict[str, Any]:
    """report.json as a dict. results, flops: name of a model -> file; baseline: a name, or None for LLaVA dense."""
    unknown = [name for name in flops if name not in results]
    if unknown:
        raise UserError(f"--flops {unknown[0]}: no --result of that name; known: {', '.join(results)}")
    read = {name: _fields(path, EVAL_COMMAND, EVAL_FIELDS) for name, path in results.items()}
    first = next(iter(read))
    for name, result in read.items():
        if FINE_DETAIL not in result["per_category"]:
            raise UserError(f"{results[name]}: no category {FINE_DETAIL}; evaluate on toy data that has it "
                            "(llava-sv data toy --fine-bench 120)")  # fmt: skip
        if (result["questions"], result["chance"]) != (read[first]["questions"], read[first]["chance"]):
            raise UserError(f"{results[name]}: other questions than {results[first]}; evaluate all on the same data")
    models = {name: build_model(result, flops.get(name)) for name, result in read.items()}
    return {
        "models": models,
        "chance": read[first]["chance"],
        "questions": read[first]["questions"],
        FINE_DETAIL: best_on_fine_detail(models, baseline or _dense_llava(models)),
        "seed": seed,
    }


def _dense_llava(models: dict[str, Any]) -> str:
    fitting = [name for name, model in models.items() if model["family"] == "llava" and not model["skipping"]]
    if len(fitting) != 1:
        raise UserError(f"--baseline is missing, and {len(fitting)} of the results are of LLaVA without skipping; "
                        f"name one of: {', '.join(models)}")  # fmt: skip
    return fitting[0]


def best_on_fine_detail(models: dict[str, Any], baseline: str) -> dict[str, Any]:
    """`best`, `baseline` and `gain_points`, percentage points between them; the baseline is best if none is better."""
    if baseline not in models:
        raise UserError(f"--baseline {baseline}: no --result of that name; known: {', '.join(models)}")
    shares = {name: models[name]["per_category"][FINE_DETAIL] for name in (baseline, *models)}
    best = max(shares, key=lambda name: shares[name])
    return {
        "best": {"name": best, "accuracy": shares[best]},
        "baseline": {"name": baseline, "accuracy": shares[baseline]},
        "gain_points": round(100 * (shares[best] - shares[baseline]), 6),
    }


def verdict(report: dict[str, Any]) -> str:
    """The sentence on fine detail."""
    fine = report[FINE_DETAIL]
    best, baseline = fine["best"], fine["baseline"]
    if best["name"] == baseline["name"]:
        return f"Fine detail: no model is better than the baseline, {baseline['name']}, at {baseline['accuracy']:.1%}."
    return (
        f"Fine detail: {best['name']} is best at {best['accuracy']:.1%}; the baseline, {baseline['name']}, reaches "
        f"{baseline['accuracy']:.1%}: a difference of {fine['gain_points']:.1f} points."
    )


def categories(report: dict[str, Any]) -> list[str]:
    """The benchmark's categories, fine detail last."""
    return [*(name for name in report["chance"]["per_category"] if name != FINE_DETAIL), FINE_DETAIL]


def render_markdown(report: dict[str, Any]) -> str:
    """report.md."""
    models = report["models"]
    columns = [*models.values(), report["chance"]]
    seed = "" if report["seed"] is None else f", seed {report['seed']}"
    lines = [
        "# Families side by side",
        "",
        f"Toy benchmark, {report['questions']} held-out questions{seed}. Chance: uniform guessing.",
        "",
        f"| category | {' | '.join(models)} | chance |",
        "|---|" + "---|" * len(columns),
        "| **all** | " + " | ".join(f"**{column['accuracy']:.1%}**" for column in columns) + " |",
    ]
    for category in categories(report):
        lines.append(f"| {category} | " + " | ".join(f"{c['per_category'][category]:.1%}" for c in columns) + " |")
    lines += ["", verdict(report), "", *_cost_lines(models), "", "![accuracy by category](report.png)", ""]
    return "\n".join(lines)


def _cost_lines(models: dict[str, Any]) -> list[str]:
    """A table of what each model costs, and what its columns mean."""
    lines = ["| model | family | visual tokens | SFT time | prefill GFLOPs | paper's FLOPs ratio |", "|" + "---|" * 6]
    for name, model in models.items():
        tokens = model["visual_tokens"]
        split = f" ({tokens['retained']} + {tokens['skipped']} + {tokens['summaries']})" if model["skipping"] else ""
        flops = f"{model['prefill_flops'] / 1e9:,.2f}" if "prefill_flops" in model else "-"
        ratio = f"{model['paper_ratio']:.3f}" if "paper_ratio" in model else "-"
        lines.append(
            f"| {name} | {model['family']} | {tokens['total']}{split} | {model['train_seconds']:,.0f} s | {flops} "
            f"| {ratio} |"
        )
    return [*lines, "", "Visual tokens: of the largest image; in brackets retained + skipped + summaries. The paper's "
            "ratio: skipping over the same family dense, visual tokens only."]  # fmt: skip


def _colours(models: dict[str, Any]) -> dict[str, str]:
    """A colour for each model, no two alike as long as there are spare ones."""
    chosen: dict[str, str] = {}
    spare = 0
    for name, model in models.items():
        colour = COLOURS.get(model["family"], ("", ""))[model["skipping"]]
        if not colour or colour in chosen.values():
            colour = SPARE_COLOURS[spare % len(SPARE_COLOURS)]
            spare += 1
        chosen[name] = colour
    return chosen


def draw_chart(report: dict[str, Any], path: Path) -> None:
    """report.png: a group of bars a category, a bar a model; all questions first, fine detail last on a plate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models, chance = report["models"], report["chance"]
    groups = ["all", *categories(report)]
    width = 0.84 / len(models)
    inches = max(11.0, 1.5 + len(groups) * (0.5 + 0.22 * len(models)))
    figure, axes = plt.subplots(figsize=(inches, 4.8), layout="constrained")

    def shares(column: dict[str, Any]) -> list[float]:
        return [column["accuracy"], *(column["per_category"][category] for category in groups[1:])]

    axes.axvspan(len(groups) - 1.5, len(groups) - 0.5, color="#fff3d6", zorder=0)
    axes.axvline(0.5, color="#cccccc", lw=0.8)
    colours = _colours(models)
    for index, (name, model) in enumerate(models.items()):
        places = [group + (index - (len(models) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(places, shares(model), 0.94 * width, color=colours[name], label=name, zorder=2)
        axes.bar_label(bars, [f"{100 * share:.0f}" for share in shares(model)], fontsize=7, padding=1)
    for group, share in enumerate(shares(chance)):
        ends = [group - 0.44, group + 0.44]
        axes.plot(ends, [share, share], color="black", lw=1, ls=":", zorder=3, label=None if group else "chance")
    axes.set_xticks(range(len(groups)), [group.replace("_", " ") for group in groups])
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    axes.grid(axis="y", color="#eeeeee", lw=0.8, zorder=1)
    axes.tick_params(length=0)
    axes.set_title(verdict(report), fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(ncols=min(len(models) + 1, 7), loc="outside lower center", fontsize=9, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> int:
    """`python -m llava_sv.eval.families ...`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_sv.eval.families",
        description="Put checkpoints of several families side by side.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "NAME=FILE"}
    parser.add_argument("--result", required=True, help=f"a model's name and what {EVAL_COMMAND} wrote", **several)
    parser.add_argument("--flops", default=[], help="what llava-sv flops --model-path wrote for it", **several)
    parser.add_argument("--baseline", metavar="NAME", help="compare with this one (default: LLaVA without skipping)")
    parser.add_argument("--seed", type=int, help="seed of data and training, for the record")
    parser.add_argument("--output", type=Path, required=True, help="folder for report.json, report.md and report.png")
    args = parser.parse_args(argv)
    results, flops = named_paths("--result", args.result), named_paths("--flops", args.flops)
    report = build(results, flops, args.baseline, args.seed)
    draw_chart(report, args.output / "report.png")
    write_text(args.output / "report.md", render_markdown(report))
    write_json(args.output / "report.json", report)
    print(render_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
