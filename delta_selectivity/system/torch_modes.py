"""Isolation from torch modes that the caller has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def default_modes() -> Iterator[None]:
    """Disable the caller's autocast and default device in this thread; other threads do not inherit them.

    The default dtype is shared by all threads, and transformers changes it while creating a model, so this package
    creates tensors with explicit dtypes.
    """
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
