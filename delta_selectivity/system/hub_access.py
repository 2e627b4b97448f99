"""Ask once whether the Hugging Face Hub answers, before a library asks five times with pauses between.

use_cache_if_unreachable()     # before the Hub is asked for something
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

TIMEOUT = 3.0
"""Seconds for the Hub to take a connection."""
KNOWN_FOR = 60.0
"""Seconds for which an answer holds."""

OFFLINE = ", and the Hub does not answer: check the name and the connection"
"""What an error says where something is not in the cache."""

_lock = threading.Lock()
_asked: tuple[float, bool] | None = None  # when, and whether it answered


def use_cache_if_unreachable() -> bool:
    """Have huggingface_hub look into its cache alone while the Hub does not answer, as with HF_HUB_OFFLINE=1.

    Returns whether the Hub may be asked. A proxy is left to the library: what stands behind it is not known here.
    """
    from huggingface_hub import constants

    global _asked
    with _lock:
        if _asked is None and constants.HF_HUB_OFFLINE:
            return False  # so the user wants it
        if _asked is None or time.monotonic() - _asked[0] > KNOWN_FOR:
            reachable = _behind_proxy() or _answers(constants.ENDPOINT)
            if not reachable:
                log.info("%s does not answer: only what is in its cache here can be used", constants.ENDPOINT)
            _asked = time.monotonic(), reachable
            constants.HF_HUB_OFFLINE = not reachable
        return _asked[1]


def _behind_proxy() -> bool:
    return any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))


def _answers(address: str) -> bool:
    """Whether somebody takes a connection there. Looking a name up may take as long as it likes: it has a thread."""
    url = urlsplit(address)
    found: list[bool] = []

    def connect() -> None:
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname or "", port), TIMEOUT).close()
            found.append(True)
        except OSError:
            found.append(False)

    asking = threading.Thread(target=connect, daemon=True)
    asking.start()
    asking.join(TIMEOUT + 1)
    return found == [True]
