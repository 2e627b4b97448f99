"""Garbage collection is off while a program loads, and afterwards skips the objects loaded so far.

Scanning these long-lived objects takes a fifth of the start time. Only programs that call `hold_collector` are
affected; the library does not change its caller's garbage collector.
"""

from __future__ import annotations

import gc

_held = False


def hold_collector() -> None:
    """Switch garbage collection off until `release_collector`."""
    global _held
    gc.disable()
    _held = True


def release_collector() -> None:
    """Switch garbage collection on again if it was held, for objects created from now on."""
    global _held
    if _held:
        gc.freeze()
        gc.enable()
        _held = False
