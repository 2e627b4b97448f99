"""Switch garbage collection off while a program loads, and on again without what was loaded.

Looking through what lasts is a fifth of the start. A library leaves its caller's collector alone: only a program that
called `hold_collector` has it changed.
"""

from __future__ import annotations

import gc

_held = False


def hold_collector() -> None:
    """Switch collections off until `release_collector`."""
    global _held
    gc.disable()
    _held = True


def release_collector() -> None:
    """Switch collections on again, if they were held, for what is made from now on."""
    global _held
    if _held:
        gc.freeze()
        gc.enable()
        _held = False
