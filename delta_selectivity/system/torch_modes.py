"""Keep what the caller has set torch to do away from the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def default_modes() -> Iterator[None]:
    """Without the caller's autocast and default device inside, in this thread; others have neither.

    The default dtype is one for all threads, and transformers changes it while a model is made: tensors are made with
    a dtype of their own in this package.
    """
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
