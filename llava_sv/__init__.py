"""llava_sv: LLaVA with Skip-Vision (arXiv 2503.21817).

Importing the package registers its config and model with transformers' Auto classes.
"""

import os
import sys

__version__ = "0.1.0"

# these answer --help, or say what is missing, without waiting for torch; they import the model when they need it
_ENTRIES = ("llava-sv", "train.py", "train_mem.py")
if os.path.basename(sys.argv[0] if sys.argv else "") not in _ENTRIES:
    from llava_sv import model as model
