"""Flags of `llava-sv release` that the model card is made of, to `CardOptions`.

Parsed arguments and the checkpoint come in; the options go out. `--license` and
`--base-license` are card-file keys by another way: they win over the file's. Called by `release`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_sv.errors import UserError

if TYPE_CHECKING:  # `--help` does not wait for torch
    from llava_sv.release.card import CardOptions

FILES = ("eval", "eval_dense", "speed")
"""Flags that take files, each any number of times."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    card = parser.add_argument_group("the model card")
    card.add_argument("--name", help="the model's name (default: the checkpoint's folder)")
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
    card.add_argument("--eval", help="reports of llava-sv eval --json on this checkpoint", **several)
    card.add_argument("--eval-dense", help="the same of a dense control, shown beside", **several)
    card.add_argument(
        "--speed", help="reports of llava-sv bench train or infer, of timing, of analyze tradeoff", **several
    )
    card.add_argument("--data-manifest", metavar="FILE", help="manifest.json of the mixture (default: found)")
    card.add_argument("--card", metavar="FILE.yaml", help="what no run knows: authors, intended_use, limitations, ...")
    card.add_argument("--license", metavar="ID", help="licence of these weights, such as apache-2.0")
    card.add_argument(
        "--base-license",
        action="append",
        default=[],
        metavar="[NAME=]ID",
        help="licence of a base model, such as openai/clip-vit-large-patch14=mit; without NAME: the language model's",
    )
    card.add_argument(
        "--base-models", nargs="+", default=[], metavar="NAME", help="names of language model and encoder"
    )
    card.add_argument("--pretrain-run", metavar="DIR", help="OUTPUT of the pretraining that the projector came from")


def check(args: argparse.Namespace) -> None:
    """`UserError` for a file that is not there."""
    if args.name is not None and not args.name.strip():
        raise UserError("--name: is empty; give the model's name")
    named = [(flag, path) for flag in FILES for path in getattr(args, flag)]
    named += [(flag, getattr(args, flag)) for flag in ("data_manifest", "card") if getattr(args, flag)]
    for flag, path in named:
        if not Path(path).is_file() and not (flag == "data_manifest" and Path(path).is_dir()):
            raise UserError(f"--{flag.replace('_', '-')} {path}: no such file")


def card_options(args: argparse.Namespace, checkpoint: Path, name: str, whole: Path | None = None) -> CardOptions:
    """The options of `checkpoint`'s card; whole: what merging its adapters made."""
    from llava_sv.release.card import CardOptions
    from llava_sv.release.card_sources import read_card_file

    options = CardOptions(
        name=name,
        eval_reports=tuple(map(Path, args.eval)),
        dense_reports=tuple(map(Path, args.eval_dense)),
        speed_reports=tuple(map(Path, args.speed)),
        data_manifest=Path(args.data_manifest) if args.data_manifest else None,
        card_file=Path(args.card) if args.card else None,
        base_models=tuple(args.base_models),
        pretrain_run=Path(args.pretrain_run) if args.pretrain_run else None,
        whole=whole,
        dtype=args.dtype,
        conv_template=args.conv_template,
    )
    if not args.license and not args.base_license:
        return options
    said = read_card_file(Path(args.card) if args.card else None)
    licences = {**said.base_licenses, **_base_licences(args.base_license, checkpoint, options)}
    return replace(options, card_file=replace(said, license=args.license or said.license, base_licenses=licences))


def _base_licences(given: list[str], checkpoint: Path, options: CardOptions) -> dict[str, str]:
    from llava_sv.release.card_model import bases_of, read_model
    from llava_sv.release.card_sources import read_run

    found = {}
    for text in given:
        name, _, licence = text.rpartition("=")
        if not licence.strip() or (not name.strip() and "=" in text):
            raise UserError(f"--base-license {text}: write ID, or NAME=ID")
        if not name:
            bases = bases_of(options.base_models, read_run(checkpoint), read_model(checkpoint))
            if len(bases) < 2:
                raise UserError(
                    f"--base-license {text}: the run does not say which language model it began with; write NAME={text}"
                )
            name = bases[0]
        found[name.strip()] = licence.strip()
    return found
