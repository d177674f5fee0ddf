"""An ablation's results: ablation.json, one table (ablation.md), a chart (ablation.png), the paper's numbers beside.

`ablation` hands over rows and where each row's and seed's evaluation and checkpoint lie. Nothing is measured here.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from llava_sv.data.toy_questions import FINE_DETAIL
from llava_sv.errors import UserError
from llava_sv.eval.ablation_rows import Row
from llava_sv.files import read_json, replacing, write_json, write_text
from llava_sv.model.loading import read_config
from llava_sv.model.token_counts import count_tokens

LEAST_SPAN = 8
"""Points that an axis of the chart spans at least, so that small differences look small."""

AGAIN = "bash scripts/ablation.sh again without {}"
"""The command that makes a lost file; `{}` is what to remove first, so that its step counts as not done."""

Sources = dict[tuple[str, int], tuple[Path, Path]]
"""(key of a row, seed) -> (JSON of `llava-sv eval`, checkpoint folder)."""


def mean_and_spread(by_seed: dict[int, float]) -> dict[str, Any]:
    """`seeds`, `mean`, and `spread`: the standard deviation over seeds (n - 1), None for a single seed."""
    values = list(by_seed.values())
    return {
        "seeds": {str(seed): value for seed, value in by_seed.items()},
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
    }


def build_row(row: Row, results: dict[int, dict[str, Any]], checkpoints: dict[int, Path]) -> dict[str, Any]:
    """One row of ablation.json. results: seed -> evaluation; checkpoints: seed -> folder."""
    first = next(iter(results.values()))
    summaries = [read_json(folder / "train_summary.json", AGAIN.format(folder)) for folder in checkpoints.values()]
    tokens = count_tokens(read_config(str(next(iter(checkpoints.values())))))
    timing = first.get("timing") or {}
    return {
        "row": row.key,
        "switches": row.switches,
        "settings": row.settings,
        "extras": row.extras,
        "kv": row.kv,
        "training": row.training,
        "checkpoints": {str(seed): str(folder) for seed, folder in checkpoints.items()},
        "accuracy": mean_and_spread({seed: result["accuracy"] for seed, result in results.items()}),
        "per_category": {
            category: mean_and_spread({seed: result["per_category"][category] for seed, result in results.items()})
            for category in first["per_category"]
        },
        "visual_tokens": {name: getattr(tokens, name) for name in ("retained", "fine", "skipped", "summaries")},
        "retained": _really_retained(results),
        "kv_bytes": timing.get("kv_bytes"),
        "kv_bytes_prefill": timing.get("kv_bytes_prefill"),
        "train_steps": summaries[0]["steps"],
        "train_seconds": statistics.fmean(summary["train_seconds"] for summary in summaries),
        "paper": {"source": row.paper.source, **row.paper.scores} if row.paper else None,
    }


def _really_retained(results: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """What the benchmark's images retained on average, where their content decides (`num_retained: auto`)."""
    found = {seed: result["retained"]["mean"] for seed, result in results.items() if result.get("retained")}
    return mean_and_spread(found) if found else None


def build(rows: list[Row], sources: Sources, about: dict[str, Any]) -> dict[str, Any]:
    """ablation.json as a dict. about: family, preset, task, seeds and data_seed of the run."""
    files = {key: sources[key][0] for key in ((row.key, seed) for row in rows for seed in about["seeds"])}
    read = {key: read_json(path, AGAIN.format(path)) for key, path in files.items()}
    first = next(iter(read))
    for key, result in read.items():
        if (result["questions"], result["chance"]) != (read[first]["questions"], read[first]["chance"]):
            raise UserError(
                f"{files[key]}: other questions than {files[first]}; remove the one of other data, and run this again"
            )
    made = [
        build_row(
            row,
            {seed: read[row.key, seed] for seed in about["seeds"]},
            {seed: sources[row.key, seed][1] for seed in about["seeds"]},
        )
        for row in rows
    ]
    return {
        **about,
        "questions": read[first]["questions"],
        "chance": read[first]["chance"]["accuracy"],
        "spread": "standard deviation over seeds (n - 1); null with one seed",
        "paper_overall": "mean of the seven benchmarks besides MME",
        "rows": made,
    }


def groups(report: dict[str, Any]) -> dict[str, str]:
    """Heading -> category (empty for all) of the columns of accuracies."""
    has_fine = all(FINE_DETAIL in row["per_category"] for row in report["rows"])
    return {"all": "", **({"fine detail": FINE_DETAIL} if has_fine else {})}


def figure_of(row: dict[str, Any], category: str) -> dict[str, Any]:
    """Mean, spread and seeds of a row in a category, or in all of them."""
    return row["per_category"][category] if category else row["accuracy"]


def _share(figure: dict[str, Any]) -> str:
    spread = "" if figure["spread"] is None else f" ± {100 * figure['spread']:.1f}"
    return f"{100 * figure['mean']:.1f}{spread}"


def label(row: dict[str, Any]) -> str:
    """A row's name, and its settings beside the switches."""
    extras = ", ".join(f"{name}={value}" for name, value in row["extras"].items())
    return f"{row['row']} ({extras})" if extras else row["row"]


def render_markdown(report: dict[str, Any]) -> str:
    """ablation.md: one table, and what it can and cannot show."""
    shown = groups(report)
    seeds = report["seeds"]
    switches = list(report["rows"][0]["switches"])
    heads = ["row", *switches, "visual tokens", "KV, KiB", *(f"{report['task']}: {name}, %" for name in shown)]
    heads += ["paper: overall", "paper: TextVQA", "paper: OCRB", "paper's setting"]
    lines = [
        f"# Ablation: {report['family']}",
        "",
        f"Preset {report['preset'] or 'none'}, {steps_said(report)}, {report['questions']} held-out questions, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))}). "
        + ("Measured: mean ± standard deviation over seeds. " if len(seeds) > 1 else "")
        + 'The columns named "paper" are the paper\'s, of LLaMA-3-8B, and were not measured here.',
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    lines += [f"| {' | '.join(_cells(row, shown))} |" for row in report["rows"]]
    return "\n".join([*lines, "", *_notes(report), "", "![accuracy by row](ablation.png)", ""])


def _cells(row: dict[str, Any], shown: dict[str, str]) -> list[str]:
    marks = ["✓" if on else "" for on in row["switches"].values()]
    if row["kv"] == "fine+skipped":
        marks[-1] = "✓ and middle"
    tokens = row["visual_tokens"]
    parts = [f"{tokens['retained']}"]
    if row["settings"] is not None:
        parts = [f"{tokens['retained']} + {tokens['skipped']} + {tokens['summaries']}"]
        if row["retained"]:  # the sum of both is the same for every image
            retained, together = row["retained"]["mean"], tokens["retained"] + tokens["skipped"]
            parts = [f"{retained:.1f} + {together - retained:.1f} + {tokens['summaries']}"]
    parts.append("-" if row["kv_bytes"] is None else f"{row['kv_bytes'] / 1024:,.0f}")
    figures = [_share(figure_of(row, category)) for category in shown.values()]
    paper = row["paper"]
    theirs = [f"{paper[name]:.1f}" for name in ("overall", "TextVQA", "OCRB")] if paper else ["-"] * 3
    return [label(row), *marks, *parts, *figures, *theirs, paper["source"] if paper else "-"]


def steps_said(report: dict[str, Any]) -> str:
    """Fine-tuning's length in words."""
    steps = sorted({row["train_steps"] for row in report["rows"]})
    return f"{' or '.join(f'{count:,}' for count in steps)} steps of fine-tuning"


def _notes(report: dict[str, Any]) -> list[str]:
    """What the figures can and cannot show."""
    rows, questions = report["rows"], report["questions"]
    means = [row["accuracy"]["mean"] for row in rows]
    middle = statistics.fmean(means)
    by_questions = 100 * (middle * (1 - middle) / questions) ** 0.5
    spreads = [row["accuracy"]["spread"] for row in rows if row["accuracy"]["spread"] is not None]
    said = f"{100 * max(spreads):.1f} points at most over seeds" if spreads else "not known from one seed"
    notes = [
        "SF skip FFN, FS and LS former and latter summary, Merge of the skipped tokens, LV last visual token through "
        "the FFN, SK skip KV-cache at inference. Visual tokens: retained + skipped + summaries of the largest image. "
        "KV: the cache that decoding starts from. The paper's check marks are deduced from its text "
        "(docs/Ablation.md).",
    ]
    if report["preset"] == "tiny":
        notes.append(
            "The tiny models show that every switch trains and answers, and what it costs in tokens and cache. They "
            "cannot show what a switch is worth at the paper's size: the questions are drawn, easy and short."
        )
    seeds = (
        f"Seeds vary the training, not the data (drawn with seed {report['data_seed']}). "
        if report["data_seed"]
        else ""
    )
    notes.append(
        f"{seeds}Rows lie {100 * (max(means) - min(means)):.1f} points apart; a row's own spread is {said}, and "
        f"{questions} questions alone leave a standard error of {by_questions:.1f} points. Smaller differences say "
        "nothing."
    )
    return [line for note in notes for line in (note, "")][:-1]


def draw_chart(report: dict[str, Any], path: Path) -> None:
    """ablation.png: a row a line. Its switches, its accuracies with seeds and spread, and the paper's overall."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, shown = report["rows"], groups(report)
    widths = [1.5, *([2.4] * len(shown)), 2.0]
    figure, panels = plt.subplots(
        1,
        len(widths),
        figsize=(3 + 1.5 * sum(widths), 1.6 + 0.36 * len(rows)),
        sharey=True,
        layout="constrained",
        width_ratios=widths,
    )
    _draw_switches(rows, panels[0])
    for panel, (name, category), colour in zip(panels[1:], shown.items(), ("#1f77b4", "#d62728")):
        for place, row in enumerate(rows):
            _draw_figure(panel, place, figure_of(row, category), colour)
        low, high = panel.get_xlim()
        widen = max(0, LEAST_SPAN - (high - low)) / 2
        panel.set_xlim(low - widen, high + widen)
        panel.set_title(f"{report['task']}: {name}", fontsize=10)
        panel.set_xlabel("accuracy, %")
    papers = [(place, row["paper"]["overall"]) for place, row in enumerate(rows) if row["paper"]]
    panels[-1].plot([score for _, score in papers], [place for place, _ in papers], "s", ms=7, color="#7f7f7f")
    for place, score in papers:
        panels[-1].annotate(f"{score:.1f}", (score, place), (8, 0), textcoords="offset points", va="center", fontsize=9)
    panels[-1].set_title("the paper: overall", fontsize=10)
    panels[-1].set_xlabel("score, LLaMA-3-8B (not measured here)")
    panels[-1].margins(x=0.2)
    for panel in panels:
        panel.grid(color="#e4e4e4", lw=0.7, axis="y" if panel is panels[0] else "both")
        panel.set_axisbelow(True)
        panel.tick_params(length=0)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[0].spines["bottom"].set_visible(False)
    seeds = len(report["seeds"])
    spread = f"mean ± standard deviation of {seeds} seeds, and each seed" if seeds > 1 else "one seed"
    figure.suptitle(f"{report['family']}, preset {report['preset'] or 'none'}: {spread}", fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def _draw_switches(rows: list[dict[str, Any]], panel: Any) -> None:
    """Names of the rows, and a dot for each switch that is on."""
    switches = list(rows[0]["switches"])
    for place, row in enumerate(rows):
        for at, is_on in enumerate(row["switches"].values()):
            panel.plot(at, place, "o", ms=8, color="#333333" if is_on else "#e4e4e4")
    panel.set_xticks(range(len(switches)), switches, fontsize=8)
    panel.xaxis.set_ticks_position("top")
    panel.set_xlim(-0.6, len(switches) - 0.4)
    panel.set_yticks(range(len(rows)), [label(row) for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)


def _draw_figure(panel: Any, place: int, it: dict[str, Any], colour: str) -> None:
    """One row's mean, spread and seeds."""
    seeds = [100 * share for share in it["seeds"].values()]
    if len(seeds) > 1:
        panel.plot(seeds, [place] * len(seeds), "o", ms=5, mfc="none", mec=colour, mew=0.9, alpha=0.7)
    spread = None if it["spread"] is None else 100 * it["spread"]
    panel.errorbar(100 * it["mean"], place, xerr=spread, fmt="D", ms=6, color=colour, elinewidth=1.6, capsize=3)


def write_report(output: Path, rows: list[Row], sources: Sources, about: dict[str, Any]) -> dict[str, Any]:
    """Build and write all three; returns ablation.json as a dict."""
    report = build(rows, sources, about)
    draw_chart(report, output / "ablation.png")
    write_text(output / "ablation.md", render_markdown(report))
    write_json(output / "ablation.json", report)
    return report
