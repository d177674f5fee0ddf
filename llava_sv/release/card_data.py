"""The card's section on the data: what it was trained on, by source, with licences, and what stands close to a
benchmark.

A `Run` and the data's manifest (`data.mix_manifest`) arrive; markdown, and data sets on the hub, leave. Called by
`card`.
"""

from __future__ import annotations

import re
from typing import Any

from llava_sv.release.card_format import Book, count, listed, plain, short, table
from llava_sv.release.card_sources import CardFile, Run

HUB = re.compile(r"https?://huggingface\.co/datasets/([\w.-]+/[\w.-]+)")


def contaminated(manifest: dict[str, Any]) -> dict[str, list[str]]:
    """Source that was taken -> benchmarks it stands close to."""
    return {
        source["source"]: list(source["contaminates"])
        for source in manifest["sources"]
        if source.get("contaminates") and source.get("taken", 1)
    }


def excluded(manifest: dict[str, Any]) -> list[str]:
    """Sources that `--exclude-contaminated` left out."""
    return [left["source"] for left in manifest.get("left_out") or [] if left.get("why") == "contaminated"]


def data_section(run: Run, manifest: dict[str, Any] | None, card_file: CardFile, book: Book) -> list[str]:
    """What the run read, then the mixture's sources."""
    data = run.settings.get("data_path")
    content = run.settings.get("data_content")
    said = book.say("training data", data and f"`{short(str(data))}`" + (f" ({content})" if content else ""))
    lines = [f"Data of this run: {said}.", ""]
    if card_file.pretraining_data:
        lines += [f"Data of pretraining, as its authors say: {card_file.pretraining_data}", ""]
    if manifest is None:
        book.lacks("data manifest")
        return [
            *lines,
            "Sources, licences and contamination: not recorded (no mixture's manifest.json). Whether the data holds a "
            "benchmark's questions cannot be told from this card.",
            "",
        ]
    return [*lines, *contamination(manifest), *_recipe(manifest), *_sources(manifest)]


def contamination(manifest: dict[str, Any]) -> list[str]:
    """The marks, first of all that is said of a mixture."""
    marked, left = contaminated(manifest), excluded(manifest)
    if not marked:
        without = f" ({listed(left)} left out by --exclude-contaminated)" if left else ""
        return [f"**Contamination: no source in the mixture is marked as close to a benchmark{without}.**", ""]
    lines = [
        "**Contamination: sources in this mixture hold questions of benchmarks, or near copies of them.** Read scores "
        "on these benchmarks with that in mind"
        + (f"; {listed(left)} was left out." if left else "; `--exclude-contaminated` was not used."),
        "",
    ]
    return [*lines, *table(("source", "stands close to"), [(name, listed(near)) for name, near in marked.items()])]


def _recipe(manifest: dict[str, Any]) -> list[str]:
    recipe = manifest.get("recipe") or {}
    rows = [
        ("Mixture", f"{recipe.get('name', '-')}: {recipe.get('title') or '-'}"),
        ("Records", plain(manifest.get("records")) if manifest.get("records") is None else count(manifest["records"])),
        ("Seed", plain(manifest.get("seed"))),
        ("Limit of each source", plain(manifest.get("limit"))),
        ("Recipe's sha256", plain(recipe.get("sha256"))),
        ("Index's sha256", plain((manifest.get("index") or {}).get("sha256"))),
        ("Manifest's sha256", manifest["own_sha256"]),
        ("Pictures were looked for", plain(manifest.get("pictures_looked_for"))),
    ]
    matches = manifest["matches"]
    rows.append(
        ("Is the manifest that the run read", "yes" if matches else "cannot be told: the run did not record it")
    )
    return table(("", ""), rows)


def _sources(manifest: dict[str, Any]) -> list[str]:
    rows = []
    for source in manifest["sources"]:
        digests = [str(file.get("sha256"))[:12] for file in _files(source) if file.get("sha256")]
        rows.append(
            (
                _linked(source),
                count(source["taken"]) if isinstance(source.get("taken"), int) else "-",
                plain(source.get("wanted")),
                plain(source.get("licence")),
                ", ".join(digests[:3]) + (f", {len(digests) - 3} more" if len(digests) > 3 else "") or "-",
            )
        )
    lines = table(("source", "records", "wanted", "licence", "sha256 of its files"), rows)
    left = manifest.get("left_out") or []
    if left:
        told = [(_linked(one), one.get("why") or "-") for one in left]
        lines += ["Left out:", "", *table(("source", "why"), told)]
    return lines


def _files(source: dict[str, Any]) -> list[dict[str, Any]]:
    files = source.get("files") or []
    files = list(files.values()) if isinstance(files, dict) else files
    return [file for file in files if isinstance(file, dict)]


def _linked(source: dict[str, Any]) -> str:
    home = source.get("home") or ""
    return f"[{source['source']}]({home})" if str(home).startswith("http") else str(source["source"])


def hub_datasets(manifest: dict[str, Any] | None, card_file: CardFile) -> list[str]:
    """Data sets with a page on the hub, in the manifest's order, each once; the card file's first."""
    found = list(card_file.datasets)
    for source in (manifest or {}).get("sources", []):
        match = HUB.match(str(source.get("home") or ""))
        if match and source.get("taken", 1):
            found.append(match[1])
    return list(dict.fromkeys(found))
