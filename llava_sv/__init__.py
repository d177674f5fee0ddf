"""llava_sv: LLaVA with Skip-Vision (arXiv 2503.21817).

Importing the package registers its config and model with transformers' Auto classes.
"""

__version__ = "0.1.0"
