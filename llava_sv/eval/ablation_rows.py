"""Rows of the ablation tables: the paper's (Tables 4, 6 and 7) with its scores as plain data, and rows of one's own.

A row is a set of `skip_vision` settings for training and a level of the skip KV-cache for inference. `ablation` runs
rows, `ablation_report` draws them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from llava_sv.errors import UserError
from llava_sv.model.compression.select import get_selector
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.retained_budget import open_yet
from llava_sv.model.token_groups import KV_LEVELS

FAMILIES: dict[str, str] = {"llava": "scripts/v1_5", "llava_hd": "scripts/v1_5_hd", "cos": "scripts/cos"}
"""Family -> folder of its pretrain.sh, finetune.sh (dense) and finetune_skip.sh."""

SWITCHES: dict[str, str] = {
    "SF": "skip_ffn",
    "FS": "former_summary",
    "LS": "latter_summary",
    "Merge": "merge",
    "LV": "last_visual_ffn",
}
"""Table 6's columns -> fields of `SkipVisionConfig`. Its sixth, SK, is the KV level."""

BENCHMARKS = ("MME", "TextVQA", "MMB", "MMVet", "MMMU", "MathV", "OCRB", "MMStar", "overall")
"""Columns of the paper's tables. `overall` is the mean of all but MME."""


@dataclass(frozen=True)
class Paper:
    """What the paper reports for a row."""

    source: str
    """Its table and setting."""
    scores: dict[str, float]
    """A key of `BENCHMARKS` -> score."""


@dataclass(frozen=True)
class Row:
    """One row."""

    key: str
    """The paper's number of the row, or a name."""
    settings: dict[str, Any] | None
    """`skip_vision` fields, the five switches always among them; None: dense."""
    kv: str
    """A key of `KV_LEVELS`."""
    paper: Paper | None = None

    @property
    def switches(self) -> dict[str, bool]:
        """Table 6's six columns."""
        settings = self.settings or {}
        return {short: bool(settings.get(name)) for short, name in SWITCHES.items()} | {"SK": self.kv != "none"}

    @property
    def extras(self) -> dict[str, Any]:
        """Settings beside the switches."""
        return {name: value for name, value in (self.settings or {}).items() if name not in SWITCHES.values()}

    @property
    def training(self) -> str:
        """Name of the training; rows of the same name share it."""
        if self.settings is None:
            return "dense"
        on = [short.lower() for short, name in SWITCHES.items() if self.settings[name]] or ["off"]
        extras = [f"{name}-{value}" for name, value in sorted(self.extras.items())]
        return "_".join(["-".join(on), *extras]).replace(",", ".")

    def flags(self) -> list[str]:
        """Flags of this row for finetune_skip.sh; none for a dense row, which finetune.sh trains."""
        settings = self.settings or {}
        return [word for name, value in settings.items() for word in (f"--sv_{name}", str(value))]


_TABLE_6: tuple[tuple[str, str, str, tuple[float, ...]], ...] = (
    ("0", "dense", "none", (1585, 64.4, 77.1, 39.4, 39.2, 21.5, 39.2, 41.2, 46.0)),
    ("1", "Merge", "none", (1548, 64.5, 75.3, 39.7, 39.1, 21.8, 37.7, 40.9, 45.6)),
    ("2", "SF", "none", (1589, 63.6, 74.4, 36.9, 38.0, 19.8, 36.5, 39.8, 44.2)),
    ("3", "SF LV", "none", (1591, 63.7, 74.9, 39.4, 38.7, 20.7, 36.3, 39.9, 44.8)),
    ("4", "SF LS", "none", (1560, 63.8, 75.5, 39.0, 39.2, 21.0, 37.1, 40.0, 45.0)),
    ("5", "SF LS LV", "none", (1580, 63.5, 74.2, 40.6, 39.2, 21.6, 37.2, 40.9, 45.3)),
    ("6", "SF FS LS", "none", (1570, 63.5, 74.1, 40.0, 39.8, 20.1, 39.0, 41.4, 45.4)),
    ("7", "SF LS Merge", "none", (1593, 62.6, 74.7, 40.3, 40.2, 21.6, 36.6, 41.1, 45.3)),
    ("8", "SF FS LS Merge", "none", (1571, 63.6, 75.9, 40.3, 40.3, 21.0, 36.1, 41.5, 45.6)),
    ("9", "SF LS Merge LV", "none", (1547, 64.0, 75.9, 38.0, 41.2, 21.9, 36.9, 40.6, 45.5)),
    ("10", "SF FS LS Merge LV", "none", (1562, 63.9, 76.5, 40.2, 40.2, 21.2, 37.2, 41.9, 45.9)),
    ("11", "SF FS LS Merge LV", "skipped", (1563, 63.7, 76.5, 41.7, 40.3, 21.2, 37.0, 41.9, 46.0)),
)
"""Table 6, CoS: row, switches, KV level, scores. Row 2's OCRB is printed as 365.

The printed check marks are deduced from the comparisons that section 10.2 names: Merge by (0, 1), (4, 7) and (6, 8),
the former summary by (4, 6), (7, 8) and (9, 10), the last token by (2, 3, 4, 5); row 4 scores above row 3, so it is
the one with the summary.
"""

_BOTH = "SF FS LS Merge LV"
_TABLE_7: tuple[str, str, str, tuple[float, ...]] = (
    "middle+small",
    _BOTH,
    "fine+skipped",
    (1562, 61.8, 76.5, 32.6, 40.4, 21.2, 22.6, 41.9, 42.4),
)
"""The one row that Table 6 has not: its other two are rows 10 and 11."""

_TABLE_4: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "llava": (
        (1519, 56.7, 72.5, 31.4, 38.8, 21.2, 30.9, 36.5, 41.1),
        (1519, 56.5, 72.5, 32.4, 38.8, 21.2, 30.7, 36.5, 41.3),
    ),
    "llava_hd": (
        (1533, 61.6, 73.0, 35.8, 39.9, 21.2, 34.5, 39.7, 43.7),
        (1534, 61.2, 73.1, 35.9, 39.7, 21.2, 34.1, 39.3, 43.5),
    ),
    "cos": (_TABLE_6[10][3], _TABLE_6[11][3]),
}
"""Family -> scores without and with skip KV-cache."""

TABLES: dict[str, tuple[str, ...]] = {
    "table4": ("no-sk", "sk"),
    "table6": tuple(row[0] for row in _TABLE_6),
    "table7": ("10", "middle+small", "11"),
}
"""Tables by name -> keys of their rows."""


def _paper_row(key: str, on: str, kv: str, source: str, scores: tuple[float, ...]) -> Row:
    settings = None if on == "dense" else {name: short in on.split() for short, name in SWITCHES.items()}
    return Row(key, settings, kv, Paper(source, dict(zip(BENCHMARKS, scores, strict=True))))


def known_rows(family: str) -> dict[str, Row]:
    """The paper's rows by key; Table 4's scores are those of `family`."""
    if family not in FAMILIES:
        raise UserError(f"FAMILY={family}: unknown family; known: {', '.join(FAMILIES)}")
    rows = [_paper_row(key, on, kv, "Table 6, CoS", scores) for key, on, kv, scores in _TABLE_6]
    key, on, kv, scores = _TABLE_7
    rows.append(_paper_row(key, on, kv, "Table 7, CoS", scores))
    names = {"llava": "LLaVA", "llava_hd": "LLaVA-HD", "cos": "CoS"}
    for (key, kv), scores in zip((("no-sk", "none"), ("sk", "skipped")), _TABLE_4[family]):
        rows.append(_paper_row(key, _BOTH, kv, f"Table 4, {names[family]}", scores))
    return {row.key: row for row in rows}


def default_rows(family: str) -> str:
    """Tables 6 and 7; without a middle scale, Table 6."""
    return "table6 table7" if family == "cos" else "table6"


def choose_rows(family: str, wanted: str | None, own: list[str]) -> list[Row]:
    """The rows of a run, each once, in order.

    wanted: names of tables and rows with spaces or commas (None: `default_rows`). own: rows as `own_row` reads them,
    put after these. `UserError` for what is unknown, for no rows at all, and for a level that the family has not.
    """
    known = known_rows(family)
    chosen: dict[str, Row] = {}
    for word in re.split(r"[\s,]+", default_rows(family) if wanted is None else wanted):
        for key in TABLES.get(word, (word,)) if word else ():
            if key not in known:
                raise UserError(f"ROWS: unknown row {key!r}; known: {', '.join((*TABLES, *known))}")
            chosen[key] = known[key]
    for text in own:
        row = own_row(text, known)
        if row.key in chosen:
            raise UserError(f"--row {text!r}: there is a row {row.key!r} already; choose another name")
        chosen[row.key] = row
    if not chosen:
        raise UserError(f"ROWS names no rows; give some of: {', '.join((*TABLES, *known))}")
    for row in chosen.values():
        if row.kv == "fine+skipped" and family != "cos":
            raise UserError(
                f"row {row.key!r}: skip_kv 'fine+skipped' drops a middle scale, and family {family!r} has none; "
                "use 'skipped' or 'none' (only 'cos' has a middle scale)"
            )
    return list(chosen.values())


def own_row(text: str, known: dict[str, Row]) -> Row:
    """`"NAME: sv_skip_layers=2-3 selection=cls_attention kv=none"` -> a `Row`.

    Fields of `SkipVisionConfig`, with or without `sv_`; `kv` is the level at inference; `like=ROW` starts from that row
    of `known` instead of `SkipVisionConfig`'s defaults; the word `dense` alone is the dense model.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if not colon or not re.fullmatch(r"[\w.+ -]+", name) or name in known or name in TABLES:
        raise UserError(f"--row {text!r}: begin with a name of its own and a colon, such as 'mine: skip_layers=2-3'")
    words = rest.split()
    if words == ["dense"]:
        return Row(name, None, "none")
    given = {}
    for word in words:
        field, equals, value = word.removeprefix("sv_").partition("=")
        if not equals or not value:
            raise UserError(f"--row {text!r}: cannot read {word!r}; write name=value, or 'dense' alone")
        given["skip_kv" if field == "kv" else field] = value
    settings: dict[str, Any] = {switch: getattr(SkipVisionConfig(), switch) for switch in SWITCHES.values()}
    kv = SkipVisionConfig().skip_kv
    like = given.pop("like", None)
    if like is not None:
        if like not in known or known[like].settings is None:
            rows = ", ".join(key for key, row in known.items() if row.settings is not None)
            raise UserError(f"--row {text!r}: no skipping row {like!r} to be like; known: {rows}")
        settings, kv = dict(known[like].settings or {}), known[like].kv
    kv = given.pop("skip_kv", kv)
    settings |= {field: _value(text, field, value) for field, value in given.items()}
    try:
        _check(settings, kv)
    except UserError as error:
        raise UserError(f"--row {text!r}: {error}") from error
    return Row(name, settings, kv)


def _value(text: str, field: str, value: str) -> Any:
    """As `SkipVisionConfig` wants it: a truth, a count, or the text itself."""
    if field in SWITCHES.values():
        if value.lower() not in ("true", "false"):
            raise UserError(f"--row {text!r}: {field} is True or False, got {value!r}")
        return value.lower() == "true"
    if field == "retained_threshold":
        return _share(text, value)
    return int(value) if field.startswith(("num_", "retained_")) and value.isdigit() else value


def _share(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"--row {text!r}: retained_threshold is a share between 0 and 1, got {value!r}") from None


def _check(settings: dict[str, Any], kv: str) -> None:
    """`UserError` for a field or value that training or inference would refuse, as far as it shows without a model."""
    known = [field.name for field in fields(SkipVisionConfig) if field.name != "skip_kv"]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r}; known: {', '.join((*known, 'kv', 'like'))}")
    if kv not in KV_LEVELS:
        raise UserError(f"kv: unknown level {kv!r}; known: {', '.join(KV_LEVELS)}")
    left_open = open_yet(settings)
    config = SkipVisionConfig.from_dict({name: value for name, value in settings.items() if name not in left_open})
    config.layers_that_skip(2**16)
    get_selector(config.selection)
