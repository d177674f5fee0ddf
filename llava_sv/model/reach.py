"""Whether the hub can be asked at all. Called before anything is looked for there by its name."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


def out_of_reach() -> bool:
    """Whether the hub's name leads nowhere on this machine: asking it would be half a minute of retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if any(getproxies().values()):
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False
