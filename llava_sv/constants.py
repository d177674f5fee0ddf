"""Sentinels shared by data and model, and units of memory. Sentinels are LLaVA's, so that its checkpoints and scripts
carry over."""

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""

IMAGE_TOKEN_INDEX = -200
"""Stands in `input_ids` where an image goes; never a vocabulary id."""

DEFAULT_IMAGE_TOKEN = "<image>"
"""Stands in text where an image goes."""

MIB, GIB = 2**20, 2**30
"""Bytes."""
