"""torchrun with a roll call of the nodes before it, and with the exit code of what it ran.

`python -m llava_sv.cluster.torchrun [--meet NODE_RANK NNODES ADDRESS PORT] [--late] TORCHRUN'S ARGUMENTS`, as
scripts/common.sh writes it. Exit code: 0, or that of the process that failed first (2, 74 and 75, whose line
has been printed), where torchrun itself says 1 and prints a traceback.
"""

from __future__ import annotations

import sys

from llava_sv.cluster import roll_call
from llava_sv.errors import CANNOT_WRITE, INTERRUPTED, PREEMPTED, UserError, exit_on_user_error

QUIET = (2, CANNOT_WRITE, PREEMPTED, INTERRUPTED)
"""Exit codes with which a process has said all there is to say."""


def run(argv: list[str]) -> int:
    """Meet the other nodes, then run torchrun. Raises `UserError` where the nodes do not come together."""
    late = "--late" in argv[:7]
    argv = [word for at, word in enumerate(argv) if not (word == "--late" and at < 7)]
    if argv[:1] == ["--meet"]:
        number, of, address, port = argv[1:5]
        argv = argv[5:]
        timeout = roll_call.join_timeout()
        roll_call.meet(roll_call.Member("node", int(number), int(of)), address, int(port), timeout, late)
    return _torchrun(argv)


def _torchrun(argv: list[str]) -> int:
    from torch.distributed import DistNetworkError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        torchrun.main(argv)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode in QUIET:
            return first.exitcode
        raise
    except (RendezvousError, DistNetworkError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the nodes did not come together ({type(error).__name__}: {reason}); see docs/MultiNode.md"
        ) from error
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error(run, sys.argv[1:]))
