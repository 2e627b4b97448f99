"""A single quick check whether the Hugging Face Hub answers, instead of a library's five slow retries.

use_cache_if_unreachable()     # before any request to the Hub
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
"""Seconds to wait for a connection to the Hub."""
VALID_FOR = 60.0
"""Seconds for which a result is reused."""

OFFLINE = ", and the Hub does not answer: check the name and the connection"
"""Part of the error for something that is not in the cache."""

_lock = threading.Lock()
_last_check: tuple[float, bool] | None = None  # time of the last check, and its result


def use_cache_if_unreachable() -> bool:
    """Restrict huggingface_hub to its cache while the Hub does not answer, as HF_HUB_OFFLINE=1 does.

    Return whether the Hub may be used. Behind a proxy no check is possible, so the library decides.
    """
    from huggingface_hub import constants

    global _last_check
    with _lock:
        if _last_check is None and constants.HF_HUB_OFFLINE:
            return False  # set by the user
        if _last_check is None or time.monotonic() - _last_check[0] > VALID_FOR:
            reachable = _behind_proxy() or _answers(constants.ENDPOINT)
            if not reachable:
                log.info("%s does not answer: only its local cache is used", constants.ENDPOINT)
            _last_check = time.monotonic(), reachable
            constants.HF_HUB_OFFLINE = not reachable
        return _last_check[1]


def _behind_proxy() -> bool:
    return any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))


def _answers(address: str) -> bool:
    """Return whether the server accepts a connection. A thread makes the attempt, since name lookup has no timeout."""
    url = urlsplit(address)
    found: list[bool] = []

    def connect() -> None:
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            socket.create_connection((url.hostname or "", port), TIMEOUT).close()
            found.append(True)
        except OSError:
            found.append(False)

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(TIMEOUT + 1)
    return found == [True]
