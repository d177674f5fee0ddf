"""The quickstart's report: two checkpoints' results in, report.json, report.md, report.png and patches.png out.

`python -m llava_sv.eval.report` is the last step of scripts/quickstart.sh. It reads what `llava-sv eval --json` and
training left behind, and measures nothing itself.
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_sv.errors import exit_on_user_error
from llava_sv.files import read_json, replacing, write_json, write_text
from llava_sv.model.loading import read_config

MADE_BY = "bash scripts/quickstart.sh"


@dataclass(frozen=True)
class Sources:
    """Where the figures come from."""

    dense: Path
    """`llava-sv eval` JSON of the dense checkpoint."""
    skip: Path
    blind: Path
    """The skipping checkpoint asked without images."""
    timing: Path
    """`llava_sv.eval.timing` JSON of both, side by side."""
    flops: Path
    """`llava-sv flops` JSON of the skipping checkpoint."""
    seed: int


def build(sources: Sources) -> dict[str, Any]:
    """report.json as a dict."""
    results = {name: read_json(getattr(sources, name), MADE_BY) for name in ("dense", "skip", "blind")}
    timing, flops = read_json(sources.timing, MADE_BY), read_json(sources.flops, MADE_BY)
    models = {}
    for name in ("dense", "skip"):
        checkpoint = results[name]["model_path"]
        models[name] = {
            "accuracy": results[name]["accuracy"],
            "per_category": results[name]["per_category"],
            "train_seconds": read_json(Path(checkpoint) / "train_summary.json", MADE_BY)["train_seconds"],
            "checkpoint": checkpoint,
            "timing": timing[name],
            "peak_memory_bytes": results[name]["peak_memory_bytes"],
        }
    config = read_config(results["skip"]["model_path"])
    blind = {key: results["blind"][key] for key in ("accuracy", "per_category")}
    return {
        **models,
        "blind": {**blind, "checkpoint": results["blind"]["model_path"]},
        "chance": results["skip"]["chance"],
        "questions": results["skip"]["questions"],
        "flops_ratio": flops["paper_ratio"],
        "exact_flops_ratio": flops["exact_ratio"],
        "exact_flops_text_tokens": flops["text_tokens"],
        "kv_ratio": models["skip"]["timing"]["kv_bytes"] / models["dense"]["timing"]["kv_bytes"],
        "visual_tokens": {
            "dense": config.num_patches,
            "retained": config.skip_vision.mean_retained,
            "skipped": config.skip_vision.skipped_of(config.num_patches),
            "summaries": config.skip_vision.summaries(),
        },
        "seed": sources.seed,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
        },
    }


def costs(report: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """(what, dense, skip, unit) of everything that skipping is to make cheaper."""
    dense, skip = report["dense"], report["skip"]
    return [
        ("SFT time", dense["train_seconds"], skip["train_seconds"], "s"),
        ("time to first token", *(m["timing"]["time_to_first_token_ms"] for m in (dense, skip)), "ms"),
        ("decode time per token", *(m["timing"]["decode_ms_per_token"] for m in (dense, skip)), "ms"),
        ("KV cache after prefill", *(m["timing"]["kv_bytes_prefill"] / 1024 for m in (dense, skip)), "KiB"),
        ("KV cache while decoding", *(m["timing"]["kv_bytes"] / 1024 for m in (dense, skip)), "KiB"),
        ("peak memory", *(m["peak_memory_bytes"] / 2**20 for m in (dense, skip)), "MiB"),
    ]


def render_markdown(report: dict[str, Any]) -> str:
    """report.md."""
    tokens = report["visual_tokens"]
    columns = {name: report[name] for name in ("dense", "skip", "blind", "chance")}
    lines = [
        "# Quickstart report",
        "",
        f"Toy benchmark, {report['questions']} held-out questions, seed {report['seed']}. Dense: {tokens['dense']} "
        f"visual tokens an image. Skip: {tokens['retained']} retained, {tokens['skipped']} skipped, "
        f"{tokens['summaries']} summaries. Blind: the skipping model without the image. Chance: uniform guessing.",
        "",
        "| category | dense | skip | blind | chance |",
        "|---|---|---|---|---|",
    ]
    for category in report["skip"]["per_category"]:
        shares = " | ".join(f"{column['per_category'][category]:.1%}" for column in columns.values())
        lines.append(f"| {category} | {shares} |")
    lines.append("| **all** | " + " | ".join(f"**{c['accuracy']:.1%}**" for c in columns.values()) + " |")
    lines += ["", "| cost | dense | skip | skip / dense |", "|---|---|---|---|"]
    for what, dense, skip, unit in costs(report):
        lines.append(f"| {what} | {dense:,.1f} {unit} | {skip:,.1f} {unit} | {skip / dense:.3f} |")
    counted = {
        "FLOPs of visual tokens, the paper's formula": report["flops_ratio"],
        f"FLOPs of a prompt with {report['exact_flops_text_tokens']} text tokens, all counted": report[
            "exact_flops_ratio"
        ],
    }
    lines += [f"| {what} | 1 | {ratio:.3f} | {ratio:.3f} |" for what, ratio in counted.items()]
    environment = report["environment"]
    timing = report["skip"]["timing"]
    lines += [
        "",
        f"Answers are timed side by side: medians of {timing['repeats']} runs on each of {timing['samples']} questions "
        f"({environment['device']}, {environment['threads']} threads, torch {environment['torch']}). At this size "
        "fixed costs weigh most: the savings in time and memory grow with the model.",
        "",
        "![accuracy and cost](report.png)",
        "",
        "![patches of one image](patches.png)",
        "",
    ]
    return "\n".join(lines)


def draw_chart(report: dict[str, Any], path: Path) -> None:
    """report.png: accuracy per category on the left, cost relative to dense on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"dense": "#1f77b4", "skip": "#2ca02c", "blind": "#bbbbbb"}
    categories = [*report["skip"]["per_category"], "all"]

    def shares(name: str) -> list[float]:
        return [*(report[name]["per_category"][c] for c in categories[:-1]), report[name]["accuracy"]]

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained", width_ratios=[3, 2])
    for offset, (name, colour) in enumerate(names.items()):
        places = [i + (offset - 1) * 0.27 for i in range(len(categories))]
        bars = left.bar(places, shares(name), 0.26, color=colour, label=name)
        left.bar_label(bars, [f"{share:.0%}" for share in shares(name)], fontsize=7, padding=1)
    for i, share in enumerate(shares("chance")):
        left.plot([i - 0.42, i + 0.42], [share, share], color="black", lw=1, ls=":", label=None if i else "chance")
    left.set_xticks(range(len(categories)), categories)
    left.set_ylim(0, 1.16)
    left.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    left.set_title("accuracy by category")
    left.legend(ncols=4, loc="upper center", fontsize=8, frameon=False)

    rows = [("FLOPs (paper's formula)", report["flops_ratio"]), ("FLOPs (all counted)", report["exact_flops_ratio"])]
    rows += [(what, skip / dense) for what, dense, skip, _ in costs(report)]
    bars = right.barh([what for what, _ in rows], [ratio for _, ratio in rows], color=names["skip"])
    right.axvline(1, color=names["dense"], lw=1.5, zorder=0.5)
    plate = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    right.bar_label(bars, [f"{ratio:.2f}" for _, ratio in rows], padding=4, bbox=plate)
    right.set_xlim(0, max(1.2, *(ratio * 1.15 for _, ratio in rows)))
    right.invert_yaxis()
    right.set_title("cost of skip, dense = 1")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def draw_patches(checkpoint: str, image: Path, path: Path) -> None:
    """patches.png: one image's retained, skipped and merged patches, by the checkpoint's own selection and merge."""
    from llava_sv.eval.patches import draw, patch_plan
    from llava_sv.generation import load_for_inference
    from llava_sv.mm_utils import load_image

    draw(patch_plan(load_for_inference(checkpoint), load_image(image)), path)


def main(argv: list[str]) -> int:
    """`python -m llava_sv.eval.report ...`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_sv.eval.report",
        description="Put a dense and a skipping checkpoint side by side.",
        epilog="example: python -m llava_sv.eval.report --dense dense.json --skip skip.json --blind blind.json "
        "--timing timing.json --flops flops.json --image playground/data/toy/images/bench-000000.jpg --seed 1 "
        "--output playground/quickstart",
    )
    for name in ("dense", "skip", "blind"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="JSON that llava-sv eval wrote")
    parser.add_argument("--timing", type=Path, required=True, help="JSON that llava_sv.eval.timing wrote")
    parser.add_argument("--flops", type=Path, required=True, help="JSON that llava-sv flops --model-path SKIP wrote")
    parser.add_argument("--image", type=Path, required=True, help="the image of patches.png")
    parser.add_argument("--seed", type=int, required=True, help="seed of data and training, for the record")
    parser.add_argument("--output", type=Path, required=True, help="folder for report.json, .md, .png and patches.png")
    args = parser.parse_args(argv)
    report = build(Sources(args.dense, args.skip, args.blind, args.timing, args.flops, args.seed))
    draw_patches(report["skip"]["checkpoint"], args.image, args.output / "patches.png")
    draw_chart(report, args.output / "report.png")
    write_text(args.output / "report.md", render_markdown(report))
    write_json(args.output / "report.json", report)
    print(render_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
