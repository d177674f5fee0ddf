"""llava_sv: LLaVA with Skip-Vision (arXiv 2503.21817).

Importing the package registers its config, model and processor with transformers' Auto classes.
"""

import os
import sys

__version__ = "0.1.0"


def _is_own_program() -> bool:
    """Whether this process runs a command of the package: `llava-sv`, `-m llava_sv.*`, or one of its files."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":
        return any(argument.startswith("llava_sv.") for argument in sys.orig_argv[:4])
    inside = os.path.realpath(program).startswith(os.path.dirname(os.path.realpath(__file__)) + os.sep)
    return inside or os.path.basename(program) == "llava-sv"


# own commands answer --help, or say what is missing, without waiting for torch; they import the model when they need it
if not _is_own_program():
    from llava_sv import auto_classes as auto_classes
    from llava_sv import model as model
