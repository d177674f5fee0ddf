"""The model zoo's recipes: zoo.yaml arrives, checked dataclasses leave. Called by `release.zoo` and its parts.

A recipe says how a checkpoint of the paper's tables is trained here: two stages, each a script with its environment,
and what that script is known to train with. Numbers of records are the mixtures' own (`data.recipes`).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from llava_sv.bench.presets import FAMILIES, LLMS, Budget, LlmSize, Setting, Switches, find_budget
from llava_sv.data.plain_yaml import read_yaml
from llava_sv.data.recipes import read_recipe
from llava_sv.errors import UserError

ZOO = Path(__file__).with_name("zoo.yaml")


@dataclass(frozen=True)
class Device:
    """An accelerator. tflops: its peak in bfloat16, without sparsity; gib: memory that a process sees."""

    title: str
    tflops: float
    gib: float

    @property
    def flops(self) -> float:
        """FLOP/s in bfloat16, at most."""
        return self.tflops * 1e12


@dataclass(frozen=True)
class Base:
    """A base model. path: folder or hub id that the scripts name; version: chat template of a decoder."""

    title: str
    path: str
    version: str = ""
    image_size: int = 0


@dataclass(frozen=True)
class DataSet:
    """What a stage trains on. text_tokens: mean of a record with an image; text_only records have none, and
    `text_only_tokens` on average. why: where these means are from."""

    mixture: str
    path: str
    images: str
    text_tokens: float
    why: str
    text_only: int = 0
    text_only_tokens: float = 0

    @property
    def records(self) -> int:
        """Records of the mixture, as its recipe has them."""
        return read_recipe(self.mixture).size or 0


@dataclass(frozen=True)
class Stage:
    """One training: a script, its environment, and what it then trains with.

    trains: `pretrain` (the projector alone) or `sft`. preset: of `FAMILIES[family]`. views: of each image, None: as its
    size asks. retained and skipped: the budget, None in a dense model (skipped also where nothing merges).
    """

    script: str
    trains: str
    family: str
    preset: str
    data: str
    lr: float
    batch: int
    per_device_batch: int
    epochs: int
    max_length: int
    zero: int
    decoder: str = "llama-3-8b"
    encoder: str = "clip-l-336"
    environment: dict[str, Any] = field(default_factory=dict)
    projector: str = "mlp2x_gelu"
    image_size: int | None = None
    views: int | None = None
    max_tiles: int | None = None
    retained: int | None = None
    skipped: int | None = None
    merge: bool | None = None

    @property
    def command(self) -> str:
        """The line that runs it, from the repository's root."""
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), "bash", self.script])

    @property
    def llm(self) -> LlmSize:
        """Sizes of the decoder."""
        return LLMS[self.decoder]

    @property
    def setting(self) -> Setting:
        """Of the largest picture."""
        return FAMILIES[self.family][self.preset]

    def budget(self, setting: Setting | None = None) -> Budget | None:
        """What skipping makes of one picture; None in a dense model."""
        setting = setting or self.setting
        if self.retained is None:
            return None
        if not self.merge:
            return find_budget(setting, self.retained, None, Switches(merge=False))
        return find_budget(setting, self.retained, min(self.skipped or 0, setting.dense_tokens - self.retained))

    def flags(self, zoo: Zoo) -> dict[str, str]:
        """Training's flags, as far as work and memory depend on them, for 8 devices: what the dry run must show."""
        flags: dict[str, Any] = {
            "model_name_or_path": zoo.decoders[self.decoder].path,
            "vision_tower": zoo.encoders[self.encoder].path,
            "version": "plain" if self.trains == "pretrain" else zoo.decoders[self.decoder].version,
            "data_path": zoo.data[self.data].path,
            "image_folder": zoo.data[self.data].images,
            "mm_family": self.family,
            "mm_projector_type": self.projector,
            "learning_rate": f"{self.lr:g}",
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.per_device_batch,
            "gradient_accumulation_steps": self.batch // (self.per_device_batch * DEVICES),
            "model_max_length": self.max_length,
            "gradient_checkpointing": True,
            "bf16": True,
            "deepspeed": f"scripts/zero{self.zero}.json",
            "mm_vision_image_size": self.image_size,
            "hd_max_tiles": self.max_tiles,
            "sv_num_retained": self.retained,
            "sv_num_skipped": self.skipped,
            "sv_merge": self.merge,
            "tune_mm_mlp_adapter": True if self.trains == "pretrain" else None,
            "unfreeze_mm_vision_tower": True if self.trains_encoder else None,
        }
        return {name: str(value) for name, value in flags.items() if value is not None}

    @property
    def trains_encoder(self) -> bool:
        """CoS trains its encoder in SFT."""
        return self.trains == "sft" and self.family == "cos"


DEVICES = 8
"""Of a run, unless the paper says more."""


@dataclass(frozen=True)
class Paper:
    """What the paper's table gives. hours: of SFT, on `gpus` A100s; flops: percent, of visual tokens; latency: ms."""

    scores: dict[str, float]
    hours: float | None = None
    flops: float | None = None
    latency: float | None = None
    gpus: int = DEVICES


@dataclass(frozen=True)
class Checkpoint:
    """A planned checkpoint: one row of a table. dense: name of the control that it is held against."""

    name: str
    table: int
    label: str
    pretrain: str
    sft: Stage
    paper: Paper
    dense: str | None = None

    @property
    def output(self) -> str:
        """The folder that its SFT leaves."""
        return f"checkpoints/{self.name}"


@dataclass(frozen=True)
class Other:
    """A row of a table that is another project's."""

    table: int
    label: str
    paper: Paper


@dataclass(frozen=True)
class Reported:
    """Hours of a stage of `checkpoint`, with another decoder perhaps, on 8 A100s, as `source` gives them."""

    checkpoint: str
    decoder: str
    trains: str
    hours: float
    source: str


@dataclass(frozen=True)
class Assumptions:
    """What no count gives; zoo.yaml says where each is from."""

    supervised_share: float
    supervised_why: str
    hd_dense_tokens: int
    hd_why: str
    time_share: dict[str, float]


@dataclass(frozen=True)
class Zoo:
    """All of zoo.yaml."""

    devices: dict[str, Device]
    cards: dict[int, float]
    decoders: dict[str, Base]
    encoders: dict[str, Base]
    data: dict[str, DataSet]
    assumptions: Assumptions
    pretraining: dict[str, Stage]
    checkpoints: dict[str, Checkpoint]
    others: list[Other]
    reported: list[Reported]


@cache
def read_zoo(path: Path = ZOO) -> Zoo:
    """The recipes. `UserError`, one line with the entry and field, for what cannot be read."""
    given = read_yaml(path)
    where = str(path)
    try:
        zoo = Zoo(
            devices=_each(Device, given["devices"], f"{where}: devices"),
            cards={int(label): float(gib) for label, gib in given["cards"].items()},
            decoders=_each(Base, given["decoders"], f"{where}: decoders"),
            encoders=_each(Base, given["encoders"], f"{where}: encoders"),
            data=_each(DataSet, given["data"], f"{where}: data"),
            assumptions=_make(Assumptions, given["assumptions"], f"{where}: assumptions"),
            pretraining=_each(Stage, given["pretraining"], f"{where}: pretraining"),
            checkpoints={},
            others=[_other(one, f"{where}: others[{place}]") for place, one in enumerate(given["others"])],
            reported=[_make(Reported, one, f"{where}: reported") for one in given["reported"]],
        )
        for place, one in enumerate(given["checkpoints"]):
            made = _checkpoint(one, f"{where}: checkpoints[{place}]")
            _check(zoo, made, f"{where}: {made.name}")
            zoo.checkpoints[made.name] = made
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: expected a model zoo's fields, found none or another kind ({error})") from error
    for name, stage in zoo.pretraining.items():
        _check_stage(zoo, stage, f"{where}: {name}")
    return zoo


def _make(kind: Any, given: Any, where: str, **more: Any) -> Any:
    """A dataclass of a mapping's fields."""
    if not isinstance(given, dict):
        raise UserError(f"{where}: expected fields, found {given!r}")
    known = {item.name for item in fields(kind)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
    values = {**given, **more}
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise UserError(f"{where}: field {missing[0]!r} is missing")
    return kind(**values)


def _each(kind: Any, given: dict[str, Any], where: str) -> dict[str, Any]:
    return {str(name): _make(kind, one, f"{where}.{name}") for name, one in given.items()}


def _checkpoint(given: dict[str, Any], where: str) -> Checkpoint:
    if not isinstance(given, dict) or "name" not in given:
        raise UserError(f"{where}: field 'name' is missing")
    where = f"{where} {given['name']}"
    parts = {
        "sft": _make(Stage, given.get("sft"), f"{where}: sft"),
        "paper": _make(Paper, given.get("paper"), f"{where}: paper"),
    }
    return _make(Checkpoint, {name: value for name, value in given.items() if name not in parts}, where, **parts)


def _other(given: dict[str, Any], where: str) -> Other:
    head = {name: value for name, value in given.items() if name in ("table", "label")}
    paper = {name: value for name, value in given.items() if name not in head}
    return _make(Other, head, where, paper=_make(Paper, paper, where))


def _check(zoo: Zoo, checkpoint: Checkpoint, where: str) -> None:
    """`UserError` for a name that is nowhere: a control, a pretraining, a base model, data."""
    if checkpoint.name in zoo.checkpoints:
        raise UserError(f"{where}: there twice")
    if checkpoint.dense is not None and checkpoint.dense not in zoo.checkpoints:
        above = _names(zoo.checkpoints)
        raise UserError(f"{where}: field 'dense' is {checkpoint.dense!r}; known, of those above: {above}")
    if checkpoint.pretrain not in zoo.pretraining:
        raise UserError(f"{where}: field 'pretrain' is {checkpoint.pretrain!r}; known: {_names(zoo.pretraining)}")
    _check_stage(zoo, checkpoint.sft, where)


def _check_stage(zoo: Zoo, stage: Stage, where: str) -> None:
    known: dict[str, tuple[str, Any]] = {
        "decoder": (stage.decoder, [name for name in zoo.decoders if name in LLMS]),
        "encoder": (stage.encoder, zoo.encoders),
        "data": (stage.data, zoo.data),
        "family": (stage.family, FAMILIES),
        "preset": (stage.preset, FAMILIES.get(stage.family, ())),
        "trains": (stage.trains, ("pretrain", "sft")),
    }
    for name, (value, values) in known.items():
        if value not in values:
            raise UserError(f"{where}: field {name!r} is {value!r}; known: {_names(values)}")


def _names(values: Any) -> str:
    return ", ".join(map(str, values)) or "none"
