"""A model card from a run's own files: a checkpoint and reports arrive; README.md's text, and files beside it, leave.

Nothing is typed in: what no file says is "not recorded". The same files give the same bytes. Called by `release`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_sv.errors import UserError
from llava_sv.eval.identity import identity
from llava_sv.release import card_budgets, card_data, card_eval, card_model, card_speed, card_training
from llava_sv.release.card_format import Book
from llava_sv.release.card_front import front_matter
from llava_sv.release.card_sources import (
    CardFile,
    Run,
    find_manifest,
    read_card_file,
    read_manifest,
    read_object,
    read_run,
)
from llava_sv.release.card_text import citation, how_to_use, intended_use, limits


@dataclass(frozen=True)
class CardOptions:
    """What a card is made of, beside the checkpoint's own folder."""

    name: str | None = None
    """The model's name; None: the folder's."""
    eval_reports: Sequence[Path] = ()
    """`llava-sv eval --json` of this checkpoint."""
    dense_reports: Sequence[Path] = ()
    """The same of a dense control, shown beside."""
    speed_reports: Sequence[Path] = ()
    """`llava_sv.eval.timing`, `llava-sv bench train|infer`; and `llava-sv analyze tradeoff`, of other budgets."""
    data_manifest: Path | None = None
    """A mixture's manifest.json or its folder; None: found where the run's data_path is a mixture."""
    card_file: Path | CardFile | None = None
    """What no run knows: YAML with the keys of `card_sources.CardFile`, or what was read of it."""
    base_models: Sequence[str] = ()
    """Names of the language model and the encoder; empty: as the run's settings name them."""
    pretrain_run: Path | None = None
    """OUTPUT of the pretraining that the projector came from."""
    whole: Path | None = None
    """Of adapters, the folder with what merging them made: the card is of that model."""
    dtype: str | None = None
    """Type that the weights will be stored in; None: as they are."""
    conv_template: str | None = None
    """Conversation template in place of the checkpoint's."""


@dataclass(frozen=True)
class Card:
    """A card. text: README.md. files: name -> bytes of what goes beside it. missing: what was not recorded."""

    text: str
    files: dict[str, bytes] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def make_card(checkpoint: Path, options: CardOptions | None = None) -> Card:
    """The card of `checkpoint`, a folder that training or converting wrote.

    Raises `UserError` for a folder without a LLaVA, a file that is broken (file and line) or of another kind than it is
    given as, and a report of another checkpoint.
    """
    options = options or CardOptions()
    checkpoint = Path(checkpoint)
    if options.name is not None and (not options.name.strip() or not options.name.isprintable()):
        raise UserError(f"name {options.name!r}: is empty or more than a line; give a name such as my-model-7b")
    run = read_run(checkpoint)
    model = card_model.read_model(options.whole or checkpoint, options.dtype, options.conv_template)
    pretrain = None if options.pretrain_run is None else _pretrain(Path(options.pretrain_run))
    bases = card_model.bases_of(options.base_models, run, model)
    on_hub = card_model.hub_bases(bases, options.base_models, run, model)
    said = options.card_file
    card_file = said if isinstance(said, CardFile) else read_card_file(said)
    found = find_manifest(options.data_manifest, run)
    manifest = None if found is None else read_manifest(found, run)
    reports = card_eval.read_reports(options.eval_reports)
    dense = card_eval.read_reports(options.dense_reports)
    speeds = card_speed.read_speeds(options.speed_reports)
    own, name, book = _identities(checkpoint, options), options.name or checkpoint.resolve().name, Book()
    budgets = card_budgets.budgets_section([one for kind, one in speeds if kind == "budgets"], checkpoint, own)
    fine = card_eval.fine_detail(reports, dense)
    sections = {
        "": [card_model.summary_line(model, name), "", *_authors(card_file, book)],
        "What it is": card_model.about(model, bases, book),
        "Token budget": card_model.tokens_section(model),
        "How to use it": how_to_use(name, model.config),
        "Training data": card_data.data_section(run, manifest, card_file, book),
        "Training": card_training.training_section(run, pretrain, card_file, book),
        "Evaluation": card_eval.evaluation_section(reports, dense, checkpoint, own, book),
        "Measured speed": card_speed.speed_section(speeds, reports, dense, checkpoint, own, model.config, book),
        "FLOPs": card_model.flops_section(model),
        "Intended use": intended_use(card_file, book),
        "Known weak spots and limits": limits(model.config, fine, budgets, card_file, book),
        "Licences": card_model.licences(bases, on_hub, card_file, manifest, book),
        "Settings of the run": card_training.settings_section(run, book),
        "Citation": citation(card_file),
    }
    body = [f"# {name}", ""]
    for title, lines in sections.items():
        body += [*([f"## {title}", ""] if title else []), *lines]
    index = card_eval.model_index(name, reports)
    datasets = card_data.hub_datasets(manifest, card_file)
    head = front_matter(card_file, on_hub, datasets, _tags(model, card_file), index)
    picture = card_training.loss_picture(run)
    files = {} if picture is None else {card_training.PICTURE: picture}
    return Card(head + "\n" + "\n".join(body).rstrip() + "\n", files, book.missing)


def _identities(checkpoint: Path, options: CardOptions) -> list[dict[str, str]]:
    """Fingerprints that a report of this model may have: of the folder, and of what is made of it."""
    template = options.conv_template
    found = [identity(checkpoint, template), identity(options.whole, template) if options.whole else None]
    if template and not read_object(checkpoint / "config.json", "training").get("conv_template"):
        found.append(identity(checkpoint))  # asked by `eval --conv-mode`
    return [one for one in found if one]


def _pretrain(folder: Path) -> Run:
    run = read_run(folder)
    if not run.summary:
        raise UserError(f"pretraining run {folder}: has no train_summary.json; name the OUTPUT of a finished run")
    return run


def _authors(card_file: CardFile, book: Book) -> list[str]:
    lines = [f"Made by: {', '.join(card_file.authors)}.", ""] if card_file.authors else []
    if not card_file.authors:
        book.lacks("authors (card file: authors)")
    if card_file.homepage:
        lines += [f"Home: {card_file.homepage}", ""]
    return lines if not card_file.notes else [*lines, card_file.notes, ""]


def _tags(model: card_model.Model, card_file: CardFile) -> list[str]:
    own = ["llava-sv", "llava", model.config.mm_family, "vision-language", "custom_code"]
    if model.config.skip_vision is not None:
        own.insert(1, "skip-vision")
    return list(dict.fromkeys([*own, *card_file.tags]))
