"""The card's front matter: what the hub reads, as YAML. Plain values arrive, text leaves. Called by `card`."""

from __future__ import annotations

from typing import Any

import yaml

from llava_sv.release.card_sources import CardFile

HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense"),
    *("cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma"),
    *("openrail", "bigscience-openrail-m", "creativeml-openrail-m", "other", "unknown"),
)
"""Identifiers that the hub knows; another name goes under `other`."""


def front_matter(
    card_file: CardFile, bases: list[str], datasets: list[str], tags: list[str], index: list[dict[str, Any]]
) -> str:
    """The block between `---` lines, keys in a fixed order; what is not recorded is left out."""
    values: dict[str, Any] = {}
    if card_file.languages:
        values["language"] = list(card_file.languages)
    if card_file.license:
        known = card_file.license.lower()
        values["license"] = known if known in HUB_LICENCES else "other"
        if known not in HUB_LICENCES:
            values["license_name"] = known.replace(" ", "-")
        if card_file.license_link:
            values["license_link"] = card_file.license_link
    values["library_name"] = "transformers"
    values["pipeline_tag"] = "image-text-to-text"
    values["tags"] = tags
    if bases:
        values["base_model"] = bases
        values["base_model_relation"] = "finetune"
    if datasets:
        values["datasets"] = datasets
    if index:
        values["model-index"] = index
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10**6)
    return f"---\n{text}---\n"
