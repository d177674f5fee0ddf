"""llava_sv: LLaVA with Skip-Vision (arXiv 2503.21817).

Importing the package registers its config and model with transformers' Auto classes.
"""

import os
import sys

__version__ = "0.1.0"

# the command line answers --help without waiting for torch; its commands import the model when they need it
if os.path.basename(sys.argv[0] if sys.argv else "") != "llava-sv":
    from llava_sv import model as model
