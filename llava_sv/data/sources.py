"""What a source of training data is: the catalogue's entries, read from YAML. `llava_sv/data/mixtures/sources/*.yaml`
arrive, one file a task group; `Source` values leave. Called by `data.recipes`, and by what converts them.

An entry of the catalogue:

    docvqa:
      title: DocVQA
      home: https://www.docvqa.org
      licence: MIT (annotations)
      annotations: docvqa/train_v1.0_withQT.json     # a path or glob below playground/data, or a list of them
      images: docvqa/documents                       # what the records' image paths begin with
      converter: docvqa                              # a key of data.converters.CONVERTERS
      options: {}                                    # the converter's own
      contaminates: [docvqa]                         # benchmarks that it stands close to
      notes: what a user should know, in a line
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava_sv.data.plain_yaml import read_yaml
from llava_sv.errors import UserError

CATALOGUE = Path(__file__).parent / "mixtures" / "sources"


@dataclass(frozen=True)
class Source:
    """One source. group: the task group (rows of the paper's Tables 8 and 9). annotations: paths or globs below the
    data root; images: the folder below it that image names are joined to ("" where they start at the root)."""

    name: str
    group: str
    title: str
    home: str
    licence: str
    annotations: tuple[str, ...]
    converter: str
    images: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    contaminates: tuple[str, ...] = ()
    notes: str = ""


def source_of(name: str, group: str, given: Any, where: str) -> Source:
    """The source that a mapping describes. `UserError` names `where`, the source and the field that is wrong."""
    where = f"{where}: source {name!r}"
    if not isinstance(given, dict):
        raise UserError(f"{where}: expected fields, found {type(given).__name__}")
    known = {entry.name for entry in fields(Source)} - {"name", "group"}
    for unknown in given.keys() - known:
        raise UserError(f"{where}: unknown field {unknown!r}; known: {', '.join(sorted(known))}")
    for needed in ("title", "home", "licence", "annotations", "converter"):
        if not given.get(needed):
            raise UserError(f"{where}: has no field {needed!r}")
    _check_kinds(given, where)
    values = dict(given, options=given.get("options") or {})
    for name_of_list in ("annotations", "contaminates"):
        value = given.get(name_of_list) or ()
        values[name_of_list] = (value,) if isinstance(value, str) else tuple(value)
    for pattern in (*values["annotations"], values.get("images") or ""):
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise UserError(f"{where}: path {pattern!r} leaves the data folder; give it relative to that")
    return Source(name=name, group=group, **values)


def _check_kinds(given: dict[str, Any], where: str) -> None:
    """`UserError` for a field that is not of its kind: text, a list of text, or a mapping."""
    for name, value in given.items():
        if name == "options":
            expected, right = "a mapping", isinstance(value or {}, dict)
        elif name in ("annotations", "contaminates"):
            several = [value] if isinstance(value, str) else value or []
            expected = "text or a list of text"
            right = isinstance(several, list | tuple) and all(isinstance(one, str) for one in several)
        else:
            expected, right = "text", isinstance(value or "", str)
        if not right:
            raise UserError(f"{where}: field {name!r} is {value!r}; expected {expected}")


@lru_cache(maxsize=1)
def catalogue() -> dict[str, Source]:
    """Every source that the project knows, by name."""
    sources: dict[str, Source] = {}
    for path in sorted(CATALOGUE.glob("*.yaml")):
        for name, given in (read_yaml(path) or {}).items():
            if name in sources:
                raise UserError(f"{path}: source {name!r} is in {sources[name].group}.yaml already")
            sources[name] = source_of(name, path.stem, given, str(path))
    return sources
