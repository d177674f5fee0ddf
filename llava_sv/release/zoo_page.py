"""The model zoo as a page: recipes, their costs and releases arrive, Markdown leaves. Called by `release.zoo`.

Each `..._table` is a head and lines for `markdown`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_sv.bench.cells import markdown, percent
from llava_sv.release.zoo_page_checks import checks_section
from llava_sv.release.zoo_recipes import DEVICES, Checkpoint, Other, Paper, Stage, Zoo
from llava_sv.release.zoo_released import RELEASED, Released

MADE_WITH = "llava-sv zoo --markdown docs/MODEL_ZOO.md --overwrite"
GB = 1e9
MIB = 2**20
FAMILY = {"llava": "LLaVA", "llava_hd": "LLaVA-HD", "cos": "CoS"}


@dataclass(frozen=True)
class Facts:
    """All that the page says. costs: row -> `zoo_cost.cost_of`; memory: row -> (SFT's, pretraining's) `memory_of`."""

    zoo: Zoo
    costs: dict[str, dict[str, Any]]
    memory: dict[str, tuple[dict[str, Any], dict[str, Any]]]
    checks: dict[str, list[dict[str, Any]]]
    released: list[Released]
    devices: tuple[str, ...]
    assumed: str = ""
    """What differs from the recipes' own assumptions, in words."""

    def status(self, name: str) -> str:
        """`released` where a folder of that name is."""
        return "released" if any(one.name == name for one in self.released) else "planned"


def page(facts: Facts) -> str:
    """docs/MODEL_ZOO.md."""
    parts = [
        "# Model zoo",
        f"Made by `{MADE_WITH}` from the recipes in `llava_sv/release/zoo.yaml`; a test holds the two together. FLOPs, "
        "hours, memory and sizes are counted by the project's own code; what is assumed is listed below. Scores, hours "
        "and latencies that are called the paper's are the paper's, not measured here.",
        *([facts.assumed] if facts.assumed else []),
        *_released(facts),
        *_planned(facts),
        *checks_section(facts.checks),
        *_assumptions(facts),
        *_papers(facts),
    ]
    return "\n\n".join(parts) + "\n"


def terminal(facts: Facts) -> str:
    """What `llava-sv zoo` prints: releases and plans, without the reasons."""
    released = markdown(*released_table(facts.released)) if facts.released else ""
    planned = markdown(*training_table(facts, facts.zoo.checkpoints))
    return "\n\n".join(filter(None, (released, planned, facts.assumed)))


def one_row(facts: Facts, name: str) -> str:
    """One checkpoint: its commands and all its figures."""
    one = facts.zoo.checkpoints[name]
    only = {name: one}
    return "\n\n".join(
        [
            f"{name}: {one.label}, Table {one.table}; {facts.status(name)}",
            commands(facts.zoo, one),
            markdown(*training_table(facts, only)),
            markdown(*memory_table(facts, only)),
            markdown(*using_table(facts, only)),
            markdown(*paper_table([(one.label, one.name, one.paper)])),
        ]
    )


def _released(facts: Facts) -> list[str]:
    parts = ["## Released"]
    if not facts.released:
        return [*parts, f"None yet: `bash scripts/zoo_tiny.sh` makes the tiny ones, in `{RELEASED}`."]
    whole = sum(one.bytes for one in facts.released)
    parts += [
        f"In the repository, under `{RELEASED}` ({whole / 1e6:.1f} MB): tiny models that `bash scripts/families.sh` "
        "trains on toy pictures, brought through the whole pipeline by `bash scripts/zoo_tiny.sh`: released, evaluated "
        "as released, released again with what was found, verified. They show what a release is; they know toy shapes "
        "only.",
        markdown(*released_table(facts.released)),
        "Accuracy: the toy benchmark, asked of the released weights; `fine detail` is its part of small words and tiny "
        "shapes.",
    ]
    plain = [one.name for one in facts.released if one.family == "llava" and one.config.get("skip_vision")]
    name = (plain or [facts.released[0].name])[0]
    lines = [
        f"llava-sv chat --model-path {RELEASED}/{name} --image-file {RELEASED}/example.jpg "
        '--prompt "What word is written in the image?"',
        f"llava-sv verify {RELEASED}/{name}",
    ]
    return [*parts, "```bash\n" + "\n".join(lines) + "\n```"]


def released_table(released: Sequence[Released]) -> tuple[list[str], list[list[str]]]:
    """Head and lines."""
    head = ["checkpoint", "family", "tokens of an image", "weights", "MB", "accuracy", "fine detail", "questions"]
    lines = []
    for one in released:
        found = one.evaluation or {}
        lines.append(
            [
                f"`{one.name}`",
                FAMILY.get(one.family, one.family),
                one.tokens,
                one.dtype,
                f"{one.bytes / 1e6:.1f}",
                percent(found.get("accuracy")),
                percent(found.get("per_category", {}).get("fine_detail")),
                str(found.get("questions", "-")),
            ]
        )
    return head, lines


def _planned(facts: Facts) -> list[str]:
    rows = facts.zoo.checkpoints
    return [
        "## Planned",
        "Every row of the paper's Tables 2, 3 and 5 that is this method's or its control's. Each "
        "becomes `checkpoints/NAME` by its two commands, and `llava-sv release checkpoints/NAME --out DIR` then makes "
        "it what others load.",
        "### Work and time",
        markdown(*training_table(facts, rows)),
        "FLOPs: of SFT, two a multiply-add, without recomputation. `of dense`: over its control's on the same data. "
        f"Hours: pretraining + SFT on {DEVICES} GPUs, `FLOPs / ({DEVICES} x peak x MFU)`, at the MFU that the paper's "
        "own dense run implies (below): what would be reached if every FLOP that is saved became time. Pretraining is "
        "shared: one run serves all checkpoints of its family and language model. The paper's hours are of SFT alone. "
        "LLaVA-HD's tokens are those of the largest picture, its FLOPs those of the mean one.",
        "### Memory",
        markdown(*memory_table(facts, rows)),
        f"What each of {DEVICES} GPUs needs at the script's batch, planned as `llava-sv doctor --plan` plans it, for "
        "samples of the full `--model_max_length` ([Memory.md](Memory.md)). `fewest`: GPUs that hold SFT under the "
        "same ZeRO stage with one sample at a time.",
        "### Size",
        markdown(*using_table(facts, rows)),
        "Weights in bfloat16, encoder included. Cache: keys and values of the largest picture in bfloat16; `kept`: "
        "after the prefill, once skipped tokens are removed.",
        "### Recipes",
        "From the repository's root; what they need below `playground/data`, [Mixtures.md](Mixtures.md) says. SV-9M on "
        "two nodes, as the paper trained it: [MultiNode.md](MultiNode.md).",
        *(part for one in rows.values() for part in (f"`{one.name}`", f"```bash\n{commands(facts.zoo, one)}\n```")),
    ]


def commands(zoo: Zoo, one: Checkpoint) -> str:
    """Both stages, a line each."""
    return f"{zoo.pretraining[one.pretrain].command}\n{one.sft.command}"


def tokens_of(stage: Stage) -> str:
    """`100 + 156 of 576`; the largest picture's."""
    budget, dense = stage.budget(), stage.setting.dense_tokens
    return str(dense) if budget is None else f"{budget.retained} + {budget.skipped} of {dense}"


def training_table(facts: Facts, rows: dict[str, Checkpoint]) -> tuple[list[str], list[list[str]]]:
    """Head and lines."""
    zoo = facts.zoo
    head = ["checkpoint", "Table", "tokens of an image", "data", "records", "FLOPs", "of dense", "MFU"]
    head += [f"hours, {DEVICES} x {zoo.devices[name].title}" for name in facts.devices]
    head += ["the paper's hours", "status"]
    lines = []
    for name, one in rows.items():
        cost = facts.costs[name]
        spans = [cost["hours"][device] for device in facts.devices]
        lines.append(
            [
                f"`{name}`",
                str(one.table),
                tokens_of(one.sft),
                f"`{one.sft.data}`",
                f"{cost['records']:,}",
                f"{cost['flops']['sft']:.2e}",
                percent(cost["flops_of_dense"]),
                percent(cost["mfu"]),
                *(f"{span['pretrain']:.1f} + {span['sft']:.1f}" for span in spans),
                paper_hours(one.paper),
                facts.status(name),
            ]
        )
    return head, lines


def paper_hours(paper: Paper) -> str:
    """With the number of GPUs where it is not the usual one."""
    if paper.hours is None:
        return "-"
    return f"{paper.hours:g}" + (f" on {paper.gpus}" if paper.gpus != DEVICES else "")


def memory_table(facts: Facts, rows: dict[str, Checkpoint]) -> tuple[list[str], list[list[str]]]:
    """Head and lines."""
    zoo = facts.zoo
    head = ["checkpoint", "SFT: batch of a GPU", "SFT: GiB", "pretraining: GiB"]
    head += [f"fits {zoo.devices[name].title}" for name in facts.devices]
    head += [f"fewest of {label} GB" for label in zoo.cards]
    lines = []
    for name, one in rows.items():
        sft, pretrain = facts.memory[name]
        most = max(sft["gib"], pretrain["gib"])
        lines.append(
            [
                f"`{name}`",
                f"{one.sft.per_device_batch}, {sft['layout']}",
                f"{sft['gib']:.1f}",
                f"{pretrain['gib']:.1f}, {pretrain['layout']}",
                *("yes" if most <= zoo.devices[device].gib else "no" for device in facts.devices),
                *(str(sft["fewest"][str(label)] or "-") for label in zoo.cards),
            ]
        )
    return head, lines


def using_table(facts: Facts, rows: dict[str, Checkpoint]) -> tuple[list[str], list[list[str]]]:
    """Head and lines."""
    head = ["checkpoint", "language model", "encoder", "weights, GB", "cache, MiB: dense", "after the prefill", "kept"]
    lines = []
    for name, one in rows.items():
        cost, cache = facts.costs[name], facts.costs[name]["kv_bytes"]
        lines.append(
            [
                f"`{name}`",
                facts.zoo.decoders[one.sft.decoder].title,
                facts.zoo.encoders[one.sft.encoder].title,
                f"{cost['bytes'] / GB:.2f}",
                *(f"{cache[part] / MIB:.1f}" for part in ("dense", "prefill", "kept")),
            ]
        )
    return head, lines


def _assumptions(facts: Facts) -> list[str]:
    zoo, said = facts.zoo, facts.zoo.assumptions
    lines = [
        [f"`{name}`", f"{one.text_tokens:g}", f"{one.text_only:,}", f"{one.text_only_tokens:g}", one.why]
        for name, one in zoo.data.items()
    ]
    head = ["data", "text tokens", "records without an image", "their text tokens", "why"]
    devices = [f"{one.title}: {one.tflops:g} TFLOP/s in bfloat16, {one.gib:g} GiB" for one in zoo.devices.values()]
    shares = ", ".join(f"{FAMILY[name]} {percent(share)}" for name, share in said.time_share.items())
    return [
        "## Assumed",
        markdown(head, lines),
        "\n".join(
            [
                f"- {percent(said.supervised_share)}: {said.supervised_why}.",
                f"- {said.hd_dense_tokens:,}: {said.hd_why}.",
                f"- Share of FLOPs saved that became time, measured here: {shares}.",
                f"- {'; '.join(devices)}. The H200 is given the MFU of the A100; faster cards wait more for memory and "
                "for one another.",
                "- Pretraining is given the MFU of its family's SFT.",
                "- No padding, no waiting for data, no evaluation. Attention is counted over the whole square of the "
                "sequence, the masked half too: a little high; at one mean length for all: a little low.",
            ]
        ),
        "`llava-sv zoo --text-tokens 300`, `llava-sv zoo --mfu 0.4` and `llava-sv zoo --device h200` count with other "
        "assumptions; MFU is what training logs as `mfu` ([Throughput.md](Throughput.md)). `llava-sv data stats` "
        "counts the tokens of your own data. `llava-sv zoo --row llava-sv-llama-3-8b-skip-100-156` prints one row with "
        "its commands.",
    ]


def paper_table(rows: Sequence[tuple[str, str, Paper]]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of (label, planned checkpoint or nothing, what the paper gives); columns that any of them has."""
    benchmarks = list(dict.fromkeys(name for _, _, paper in rows for name in paper.scores))
    timed = any(paper.hours or paper.latency for _, _, paper in rows)
    head = ["the paper's row", "here", *benchmarks, *(["hours", "FLOPs", "latency, ms"] if timed else [])]
    lines = []
    for label, name, paper in rows:
        line = [label, f"`{name}`" if name else "not this project's"]
        line += [f"{paper.scores[one]:g}" if one in paper.scores else "-" for one in benchmarks]
        if timed:
            line += [paper_hours(paper), "-" if paper.flops is None else f"{paper.flops:g}%"]
            line += ["-" if paper.latency is None else f"{paper.latency:g}"]
        lines.append(line)
    return head, lines


def _same(zoo: Zoo, other: Other) -> str:
    """The planned checkpoint that a row of another table tells of too: the one with the same scores; empty for none."""
    same = (one.name for one in zoo.checkpoints.values() if other.paper.scores.items() <= one.paper.scores.items())
    return next(same, "")


def _papers(facts: Facts) -> list[str]:
    parts = ["## The paper's figures", "Of the planned checkpoints none is measured yet: these are the paper's alone."]
    for table in (2, 3, 5):
        ours = [(one.label, one.name, one.paper) for one in facts.zoo.checkpoints.values() if one.table == table]
        others = [(one.label, _same(facts.zoo, one), one.paper) for one in facts.zoo.others if one.table == table]
        parts += [f"### Table {table}", markdown(*paper_table([*ours, *others]))]
    return parts
