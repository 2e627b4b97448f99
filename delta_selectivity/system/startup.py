"""Settings of the process that programs make at their start; the library leaves its caller's as they are.

No garbage collection while a program loads, and none of the objects loaded by then: scanning these long-lived objects
takes a fifth of the start time. A smaller cache of oneDNN's compiled products: there is one for each shape of a batch,
and its default of 1024 takes most of a gigabyte in a run over many texts.
"""

from __future__ import annotations

import gc
import os

_PRIMITIVES = 256
_paused = False


def limit_primitive_cache() -> None:
    """Limit the number of compiled products that oneDNN keeps, unless the user has; before torch is imported."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_PRIMITIVES))


def pause_garbage_collection() -> None:
    """Switch garbage collection off until `resume_garbage_collection`."""
    global _paused
    gc.disable()
    _paused = True


def resume_garbage_collection() -> None:
    """Switch garbage collection on again if it was held, for objects created from now on."""
    global _paused
    if _paused:
        gc.freeze()
        gc.enable()
        _paused = False
