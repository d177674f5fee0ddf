"""`llava-sv analyze attention`: what each generated token looked at (the paper's Figures 7 to 10 and 12 to 17).

A checkpoint and pictures come in; shares of attention by group of tokens and layer go out (attention.npz, .json, .png),
and heat maps over the first pictures (attention_maps.png). `attention_rows` takes attention down, `attention_tally`
adds up, `attention_places` finds patches, `attention_figures` draws.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from llava_sv.analysis.attention_figures import draw_maps, draw_shares
from llava_sv.analysis.attention_places import Canvas, Picture, Places
from llava_sv.analysis.attention_rows import watch
from llava_sv.analysis.attention_tally import Tally
from llava_sv.analysis.common import Job, Results, Sample, make_parser, open_job
from llava_sv.analysis.trajectory import parse_layers
from llava_sv.errors import UserError
from llava_sv.generation import decode, generate
from llava_sv.model.token_counts import check_has_middle
from llava_sv.model.token_groups import KV_LEVELS, TokenRole, is_visual

EXAMPLE = (
    "llava-sv analyze attention --model-path checkpoints/tiny-skip --image-folder playground/data/toy/images "
    "--prompt 'What word is written in the image?' --maps 3 --map-token 1"
)
MOST_MAPS = 64
"""Rows of one sheet that still make a picture."""
MAPPED_LAYERS = 4


def main(argv: list[str]) -> int:
    """Entry point of `llava-sv analyze attention`."""
    parser = make_parser(
        "attention",
        "The attention of generated tokens to text, retained, fine, summary and skipped tokens and to the answer so "
        "far, per layer and head; and where on the picture it falls. Greedy answers, any checkpoint that sees.",
        EXAMPLE,
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer looked at (default 32)")
    parser.add_argument(
        "--skip-kv", default="none", metavar="LEVEL",
        help=f"skip KV-cache level: {', '.join(KV_LEVELS)} (default none: what is skipped stays to be looked at)",
    )  # fmt: skip
    parser.add_argument("--maps", type=int, default=4, metavar="N", help="pictures with heat maps (default 4; 0: none)")
    parser.add_argument(
        "--map-token", type=int, metavar="N", help="maps of the answer's Nth token alone, counted from 1, of pictures "
        "whose answer is as long (default: the mean of all)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", metavar="LIST", help="layers with a heat map: all, 8-31 or 0,15,31 (default: "
        f"{MAPPED_LAYERS} of them, first to last)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    check_arguments(args)
    results = Results(args.output, "attention", args.overwrite)
    if args.maps:
        results.add_figure("attention_maps", args.overwrite)
    job = open_job(args)
    check_level(job.model.config, args.skip_kv)
    layers = mapped_layers(args.layers, job.model.config.num_hidden_layers)
    tally = Tally(job.model.config, args.max_new_tokens)
    pictures = run(job, tally, args)
    numbers = {**job.facts(), **settings(args), **tally.numbers(), "maps": [_answers(picture) for picture in pictures]}
    arrays = {**tally.arrays(), **_map_arrays(pictures)}
    results.save(arrays, numbers, lambda: draw_shares(tally, args.skip_kv))
    if pictures:
        results.save_figure("attention_maps", lambda: draw_maps(pictures, layers, args.map_token))
    elif args.maps:
        print(f"no maps: no answer has {args.map_token} tokens")
    print(tally.in_words())
    if args.skip_kv != "none":
        print(note_of(args.skip_kv))
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """`UserError` for what can be said before anything is loaded."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be 1 or more")
    if not 0 <= args.maps <= MOST_MAPS:
        raise UserError(f"--maps {args.maps}: must be 0 (none) to {MOST_MAPS}")
    if args.map_token is not None and not 1 <= args.map_token <= args.max_new_tokens:
        raise UserError(f"--map-token {args.map_token}: must be 1 to --max-new-tokens, {args.max_new_tokens}")
    if args.skip_kv not in KV_LEVELS:
        raise UserError(f"--skip-kv {args.skip_kv}: unknown level; known: {', '.join(KV_LEVELS)}")


def check_level(config: Any, level: str) -> None:
    """`UserError` for a KV level that drops what this checkpoint never has."""
    if level != "none" and config.skip_vision is None:
        raise UserError(f"--skip-kv {level}: this checkpoint is dense and skips no tokens; leave --skip-kv out")
    check_has_middle(config, level)


def mapped_layers(text: str | None, count: int) -> list[int]:
    """The layers of `--layers` (None: some, first to last) of `count`, in order. `UserError` for what is no layer."""
    if text is None:
        return sorted({round(i * (count - 1) / (MAPPED_LAYERS - 1)) for i in range(MAPPED_LAYERS)})
    return parse_layers("--layers", text, count)


def run(job: Job, tally: Tally, args: argparse.Namespace) -> list[Picture]:
    """Every picture into `tally`, one after another; returns those with maps."""
    pictures: list[Picture] = []
    # as in training: what the projector made must stay fit for a derivative
    job.assistant = replace(job.assistant, in_training=True)
    with Places(job.assistant) as places:
        for sample in job.samples("attention"):
            wanted = len(pictures) < args.maps
            with watch(job.model, args.skip_kv, keep_rows=wanted, only=args.map_token) as recorder:
                tokens = generate(
                    job.assistant, sample.batch, args.skip_kv,
                    max_new_tokens=args.max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
                )  # fmt: skip
            assert recorder.roles is not None
            tally.add(sample.name, recorder.shares(), recorder.seen())
            rows = recorder.rows()
            if rows is not None:
                canvases = canvases_of(places, sample, recorder.roles, rows)
                pictures.append(Picture(sample.name, decode(job.assistant, tokens)[0], canvases))
    return pictures


def canvases_of(places: Places, sample: Sample, roles: Tensor, rows: Tensor) -> list[Canvas]:
    """The sample's grids. roles: [T] of its prompt; rows: [L, T] attention to each position."""
    visual = is_visual(roles)
    assert sample.batch.images is not None
    return places.canvases(sample.batch.images[0], sample.image.size, roles[visual], rows[:, visual])


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, with what it means for the shares."""
    said = {"skip_kv": args.skip_kv, "max_new_tokens": args.max_new_tokens, "map_token": args.map_token}
    return said if args.skip_kv == "none" else {**said, "note": note_of(args.skip_kv)}


def note_of(level: str) -> str:
    """What a KV level does to the shares."""
    dropped = " and ".join(TokenRole(role).name.lower() for role in KV_LEVELS[level])
    return (
        f"skip KV-cache {level}: {dropped} tokens leave the cache after the first generated token, so from the second "
        "on their share is 0; use --skip-kv none to see what they would get"
    )


def _answers(picture: Picture) -> dict[str, Any]:
    """For the JSON: the answer, and per layer the attention that fell on each grid."""
    on_grid = {canvas.name: canvas.mass.sum(axis=(1, 2)) for canvas in picture.canvases}
    return {"name": picture.name, "answer": picture.answer, "share_on_patches": on_grid}


def _map_arrays(pictures: list[Picture]) -> dict[str, np.ndarray]:
    """For the npz: map_I_GRID [L, rows, columns] of picture I."""
    return {f"map_{i}_{one.name}": one.mass for i, picture in enumerate(pictures) for one in picture.canvases}
