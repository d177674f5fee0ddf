"""What `llava-sv flops` prints: reports of `counts` and `paper_table` in, text out."""

from __future__ import annotations

from typing import Any

from llava_sv.bench.cells import markdown, percent
from llava_sv.bench.presets import FAMILIES, LLMS
from llava_sv.constants import MIB

BILLION = 1e9


def unit_of(report: dict[str, Any]) -> tuple[str, float]:
    """(name, FLOPs) of the unit that this report's figures read well in."""
    return ("GFLOPs", BILLION) if report["dense"]["prefill"]["total"] > 50 * BILLION else ("MFLOPs", BILLION / 1000)


def render(report: dict[str, Any]) -> str:
    """The report of one question for a terminal."""
    name = " ".join(filter(None, (report["family"], report["preset"])))
    layers, whole = report["skipping_layers"], report["llm"]["num_hidden_layers"]
    some = "" if layers == whole else f", {layers} of {whole} layers skip"
    lines = [
        f"{name}: {report['dense_tokens']} dense tokens against {report['num_retained']} retained + "
        f"{report['num_skipped']} skipped, {report['text_tokens']} text tokens{some}"
    ]
    if report["retained_bounds"]:
        least, most = report["retained_bounds"]
        lines.append(f"  num_retained auto: counted at the average budget; an image retains {least} to {most}")
    shares = (
        ("the paper's formula (visual tokens, one layer)", "paper_ratio"),
        ("exact, prefill: language model", "exact_llm_ratio"),
        ("exact, prefill: with encoder and projector", "exact_ratio"),
        ("exact, decoding: a token", "decode_ratio"),
        (f"exact, answer of {report['new_tokens']} tokens: all", "end_to_end_ratio"),
        ("exact, training step: language model", "train_llm_ratio"),
        ("exact, training step: all", "train_ratio"),
        ("KV-cache", "kv_ratio"),
    )
    lines += [f"  {label:<48}{percent(report[key]):>7}" for label, key in shares]
    lines += ["", *_parts(report), "", *_answers(report), "", *_bytes(report)]
    return "\n".join(lines + (["", *_memory(report["memory"])] if "memory" in report else []))


def _parts(report: dict[str, Any]) -> list[str]:
    """FLOPs of prefill and training, part by part."""
    dense, skip = report["dense"], report["skip"]
    unit, size = unit_of(report)
    lines = [f"  {unit + ' of a sample':<22}{'prefill: dense':>15}{'skip':>12}{'train: dense':>15}{'skip':>12}"]
    for part, value in dense["prefill"].items():
        figures = (value, skip["prefill"][part], dense["train"][part], skip["train"][part])
        cells = [f"{figure / size:,.2f}" for figure in figures]
        lines.append(f"  {part:<22}{cells[0]:>15}{cells[1]:>12}{cells[2]:>15}{cells[3]:>12}")
    return lines


def _answers(report: dict[str, Any]) -> list[str]:
    """Decoding and cache, a row a KV level."""
    unit, size = unit_of(report)
    head = f"  {'answer, KV level':<22}{'cached':>8}{'KV MiB':>10}{unit + ' a token':>16}{unit + ' in all':>15}"
    lines = [head]
    for side in ("dense", "skip"):
        for level, row in report[side]["answer"].items():
            name = side if side == "dense" else f"skip, {level}"
            each = "-" if row["decode_per_token"] is None else f"{row['decode_per_token'] / size:,.3f}"
            lines.append(
                f"  {name:<22}{row['kv_tokens']:>8}{row['kv_bytes'] / MIB:>10,.1f}{each:>16}"
                f"{row['end_to_end'] / size:>15,.1f}"
            )
    return lines


def _bytes(report: dict[str, Any]) -> list[str]:
    memory = {side: report[side]["memory"] for side in ("dense", "skip")}
    samples = "a sample" if report["batch"] == 1 else f"{report['batch']} samples"
    cache = ", ".join(f"{memory[side]['kv_cache'] / MIB:,.1f} {side}" for side in memory)
    return [
        f"  {report['dtype']}: weights {memory['skip']['weights'] / MIB:,.0f} MiB "
        f"({sum(report['parameters'].values()) / BILLION:.3f} billion parameters), "
        f"KV-cache of {samples} at the answer's end, MiB: {cache}"
    ]


def _memory(memory: dict[str, Any]) -> list[str]:
    """Traced peaks."""
    lines = [f"  {'peak memory, MiB':<34}{'dense':>12}{'skip':>12}"]
    for name, sides in memory.items():
        for part in dict.fromkeys([*sides["dense"], *sides["skip"]]):
            cells = [f"{sides[side].get(part, 0) / MIB:,.0f}" for side in ("dense", "skip")]
            lines.append(f"  {name + ': ' + part:<34}{cells[0]:>12}{cells[1]:>12}")
    return lines


def render_table(report: dict[str, Any]) -> str:
    """The paper's table, and its Table 1, as Markdown."""
    head = ["setting", "paper's formula", "paper prints", "exact, decoder", "exact, prefill", "exact, training step"]
    head += [f"exact, answer of {report['new_tokens']}", "KV-cache"]
    keys = ("exact_llm_ratio", "exact_ratio", "train_ratio", "end_to_end_ratio", "kv_ratio")
    rows = [
        [row["label"], percent(row["paper_ratio"]), f"{row['printed']}%", *(percent(row[key]) for key in keys)]
        for row in report["settings"]
    ]
    table = [
        [
            name,
            row["complexity"],
            f"{row['parameters'] / BILLION:.2f}B",
            percent(row["share"]),
            row["printed"],
            percent(row["flops_share"]),
        ]
        for name, row in report["table_1"].items()
    ]
    names = ["part", "multiply-adds", "parameters", "share", "paper prints", f"FLOPs at N = {report['table_1_tokens']}"]
    note = (
        "LLaVA-HD's printed 50% is of a baseline of about "
        f"{report['hd_baseline']} tokens: images of fewer tiles than 2 x 2."
    )
    return "\n".join([markdown(head, rows), "", note, "", markdown(names, table)])


def render_presets() -> str:
    """Families and presets, and the language models that are known by name."""
    rows = []
    for family, presets in FAMILIES.items():
        for name, setting in presets.items():
            budget = ["-" if count is None else str(count) for count in (setting.num_retained, setting.num_skipped)]
            encoder = f"{setting.views} x {setting.encoder.patches}"
            rows.append([family, name, encoder, str(setting.dense_tokens), *budget])
    head = ["family", "preset", "views x patches", "dense tokens", "retained", "skipped"]
    models = [
        [
            name,
            str(llm.hidden_size),
            str(llm.intermediate_size),
            str(llm.num_hidden_layers),
            f"{llm.num_attention_heads}/{llm.num_key_value_heads}",
            str(llm.vocab_size),
        ]
        for name, llm in LLMS.items()
    ]
    names = ["language model", "width", "FFN", "layers", "heads/KV heads", "vocabulary"]
    return "\n".join([markdown(head, rows), "", markdown(names, models)])
