"""The table of all sources in docs/Mixtures.md, made from the catalogue and the recipes.
`python -m llava_sv.data.recipe_table docs/Mixtures.md` renews it in place; a test compares the two.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llava_sv.data.recipes import Recipe, built_in, read_recipe
from llava_sv.data.sources import Source, catalogue
from llava_sv.errors import UserError
from llava_sv.files import write_text

BEGIN, END = "<!-- sources: begin -->", "<!-- sources: end -->"
GROUPS = {
    "pretrain": "Pretraining",
    "instruction": "Instruction",
    "caption": "Caption",
    "vqa": "VQA",
    "reasoning": "Visual reasoning",
    "knowledge": "Knowledge",
    "chart": "Chart and diagram",
    "document": "Document",
    "math": "Math",
    "ocr": "OCR, screen and scene text",
    "science": "Science",
    "others": "Others",
}


def tables() -> str:
    """A table for each group of the catalogue, in Markdown."""
    recipes = [read_recipe(name) for name in built_in()]
    groups = [*GROUPS, *sorted({source.group for source in catalogue().values()} - set(GROUPS))]
    blocks = []
    for group in groups:
        sources = [source for source in catalogue().values() if source.group == group]
        if sources:
            lines = [f"### {GROUPS.get(group, group)}", "", "| source | what it is | below the root | in | licence |"]
            lines += ["|---|---|---|---|---|", *(_row(source, recipes) for source in sources)]
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _row(source: Source, recipes: list[Recipe]) -> str:
    uses = []
    for recipe in recipes:
        for entry in recipe.entries:
            if entry.source.name == source.name:
                uses.append(recipe.name if entry.count is None else f"{recipe.name} {entry.count:,}")
    marked = f"; **stands close to {', '.join(source.contaminates)}**" if source.contaminates else ""
    title = f"[{source.title}]({source.home})" if " " not in source.home else f"{source.title} ({source.home})"
    paths = ", ".join(f"`{path}`" for path in (*source.annotations, *filter(None, [source.images])))
    return _cells(f"`{source.name}`", title + marked, paths, ", ".join(uses), source.licence)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def renewed(page: str) -> str:
    """The page with its tables made anew. `UserError` where it has no marks for them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_text(name, renewed(Path(name).read_text(encoding="utf-8")))
