"""`llava-sv zoo`: the checkpoints of the paper's tables as recipes, what each costs, and those that are released.

The command line: flags to `Facts`, printed and written. Recipes are read by `zoo_recipes`, costs counted by `zoo_cost`,
memory planned by `zoo_memory`, releases read by `zoo_released`; `zoo_page` sets the page.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

from llava_sv.errors import UserError, exit_on_user_error
from llava_sv.files import check_can_write, keep_existing, write_json, write_text
from llava_sv.release import zoo_memory
from llava_sv.release.zoo_cost import checks, cost_of
from llava_sv.release.zoo_page import Facts, commands, one_row, page, terminal
from llava_sv.release.zoo_recipes import Zoo, read_zoo
from llava_sv.release.zoo_released import RELEASED, read_released

EXAMPLE = """example:
  llava-sv zoo
  llava-sv zoo --row llava-sv-llama-3-8b-skip-100-156 --device h200
  llava-sv zoo --mfu 0.4 --text-tokens 300 --json zoo.json
  llava-sv zoo --markdown docs/MODEL_ZOO.md --overwrite"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-sv zoo",
        description="List the model zoo: every checkpoint of the paper's tables as a recipe, with the FLOPs, hours, "
        "memory and size that it takes, counted; and the checkpoints that are released.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--row", metavar="NAME", help="this checkpoint alone, with its commands")
    parser.add_argument("--device", help="hours on eight of this device alone: a100-80gb, h200")
    parser.add_argument("--mfu", type=float, help="share of the peak (default: what the paper's dense run implies)")
    parser.add_argument("--text-tokens", type=float, help="SFT: text beside an image (default: the assumed mean)")
    parser.add_argument("--released", metavar="DIR", default=str(RELEASED), help=f"released checkpoints ({RELEASED})")
    parser.add_argument("--markdown", metavar="FILE", help="write the page here")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--overwrite", action="store_true", help="replace what --markdown and --json name")
    parser.add_argument("--plan-memory", action="store_true", help="plan all memory anew; the package keeps the plans")
    return parser


def gather(
    zoo: Zoo,
    rows: list[str] | None = None,
    device: str | None = None,
    mfu: float | None = None,
    text_tokens: float | None = None,
    released: Path = RELEASED,
) -> Facts:
    """All figures. rows: the checkpoints that are asked for, all by default."""
    names = rows or list(zoo.checkpoints)
    said = [f"an MFU of {mfu:g}" if mfu is not None else ""]
    said += [f"{text_tokens:g} text tokens beside an image in SFT" if text_tokens is not None else ""]
    given = " and ".join(filter(None, said))
    chosen = {name: zoo.checkpoints[name] for name in names}
    return Facts(
        zoo,
        costs={name: cost_of(zoo, one, mfu, text_tokens) for name, one in chosen.items()},
        memory={
            name: (zoo_memory.memory_of(zoo, one.sft), zoo_memory.memory_of(zoo, zoo.pretraining[one.pretrain]))
            for name, one in chosen.items()
        },
        checks=checks(zoo),
        released=read_released(released),
        devices=(device,) if device else tuple(zoo.devices),
        assumed=f"Counted with {given}, as given." if given else "",
    )


def report(facts: Facts) -> dict[str, Any]:
    """The figures as JSON."""
    zoo = facts.zoo
    rows = {}
    for name, cost in facts.costs.items():
        one = zoo.checkpoints[name]
        sft, pretrain = facts.memory[name]
        rows[name] = {
            "table": one.table,
            "label": one.label,
            "status": facts.status(name),
            "commands": commands(zoo, one).splitlines(),
            "output": one.output,
            "dense": one.dense,
            "data": one.sft.data,
            **cost,
            "hours": {device: cost["hours"][device] for device in facts.devices},
            "memory": {"sft": sft, "pretrain": pretrain},
            "paper": vars(one.paper),
        }
    found = [
        {"name": one.name, "bytes": one.bytes, "weights": one.weights, "evaluation": one.evaluation}
        for one in facts.released
    ]
    return {"planned": rows, "released": found, "checks": facts.checks, "assumptions": vars(zoo.assumptions)}


def _check(zoo: Zoo, args: argparse.Namespace) -> None:
    """`UserError` for what cannot be meant."""
    if args.row is not None and args.row not in zoo.checkpoints:
        like = difflib.get_close_matches(args.row, zoo.checkpoints, 3, 0.3) or list(zoo.checkpoints)
        raise UserError(f"--row: no checkpoint {args.row!r} in the zoo; there are {', '.join(like)}")
    if args.released != str(RELEASED) and not Path(args.released).is_dir():
        raise UserError(f"--released {args.released}: no such folder; name the one that holds the releases")
    if args.device is not None and args.device not in zoo.devices:
        raise UserError(f"--device: unknown device {args.device!r}; known: {', '.join(zoo.devices)}")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g}: expected a share of the peak, above 0 and at most 1, such as 0.4")
    if args.text_tokens is not None and not 1 <= args.text_tokens < 1e7:
        raise UserError(f"--text-tokens {args.text_tokens:g}: expected a mean number of tokens, 1 or more")
    if args.row is not None and args.markdown is not None:
        raise UserError("--row does not go with --markdown: the page has every row")
    for flag in ("markdown", "json"):
        path = getattr(args, flag)
        keep_existing(path, args.overwrite, f"--{flag}")
        if path is not None:
            check_can_write(f"--{flag}", Path(path))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    zoo = read_zoo()
    _check(zoo, args)
    if args.plan_memory:
        zoo_memory.keep_all(zoo)
    rows = [args.row] if args.row else None
    facts = gather(zoo, rows, args.device, args.mfu, args.text_tokens, Path(args.released))
    if args.markdown:
        write_text(args.markdown, page(facts))
    if args.json:
        write_json(args.json, report(facts))
    print(one_row(facts, args.row) if args.row else terminal(facts))
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(main, sys.argv[1:]))
