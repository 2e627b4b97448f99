"""Make the n-th call of one kind of function fail, without any support in the program."""

from __future__ import annotations

import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from delta_selectivity.models.language_model import LanguageModel, ModelInfo
from delta_selectivity.probing import c_path, selectivity
from delta_selectivity.probing.backends.torch_lbfgs import TorchLbfgs
from delta_selectivity.records import scores
from delta_selectivity.run import cell_result, evaluation, progress
from delta_selectivity.run.bounded_queue import BoundedQueue
from delta_selectivity.run.preflight import Preflight
from delta_selectivity.run.reconstruction import ReconstructionSums
from delta_selectivity.run.row_store import RowStore
from delta_selectivity.saes import Sae
from delta_selectivity.saes.source import SaeSource
from delta_selectivity.system import file_lock

FULL_DISK = partial(OSError, 28, "No space left on device")
FAULT = partial(RuntimeError, "injected fault")

POINTS: dict[str, tuple[Any, str, Callable[[], Exception]]] = {  # kind -> (owner, attribute, error)
    "open": (pathlib.Path, "open", FULL_DISK),
    "write": (json, "dump", FULL_DISK),
    "fsync": (os, "fsync", FULL_DISK),
    "replace": (pathlib.Path, "replace", FULL_DISK),
    "touch": (pathlib.Path, "touch", FULL_DISK),
    "lock": (file_lock, "_acquire", FULL_DISK),
    "model": (ModelInfo, "load", FAULT),
    "sae": (SaeSource, "load", FAULT),
    "preflight": (Preflight, "examine", FAULT),
    "forward": (LanguageModel, "activations", FAULT),
    "encode": (Sae, "encode", FAULT),
    "decode": (Sae, "decode", FAULT),
    "sums": (ReconstructionSums, "figures", FAULT),
    "put": (BoundedQueue, "put", FAULT),
    "get": (BoundedQueue, "__iter__", FAULT),
    "close": (BoundedQueue, "close", FAULT),
    "keep": (RowStore, "put", FAULT),
    "rows": (RowStore, "get", FAULT),
    "fit": (TorchLbfgs, "fit", FAULT),
    "score": (selectivity, "_held_out_scores", FAULT),
    "choose": (c_path, "out_of_fold_losses", FAULT),
    "statistics": (selectivity, "statistics", FAULT),
    "save": (cell_result, "save", FULL_DISK),
    "load": (scores, "load", FAULT),
    "settle": (evaluation, "settle", FAULT),
    "texts": (progress.ProgressBars, "texts", FAULT),
    "probes": (progress.ProgressBars, "probes", FAULT),
}


IN_THE_LOOK_BEFORE = {"forward", "encode", "decode"}  # other parts of a run also call it, dozens of times


@dataclass
class Injector:
    """A counter of the calls of one kind, in any thread, which makes the n-th call fail."""

    error: Callable[[], Exception]
    n: int | None  # None: count only
    on_fault: Callable[[], None] = lambda: None
    calls: int = 0
    hit: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self) -> None:
        with self.lock:
            self.calls += 1
            if self.calls != self.n:
                return
            self.hit = True
        self.on_fault()
        raise self.error()


@contextmanager
def fault(kind: str, injector: Injector) -> Iterator[None]:
    """Install the injector for this kind of call."""
    owner, name, _ = POINTS[kind]
    original = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, _wrapped(kind, original, injector))
        if kind in IN_THE_LOOK_BEFORE:
            patch.setattr(Preflight, "sample", _no_look)
        yield


def _no_look(*_args: Any) -> None:
    raise ArithmeticError("nothing to look at")


def _wrapped(kind: str, original: Callable[..., Any], injector: Injector) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        injector.step()
        return original(*args, **kwargs)

    def open_for_writing(path: pathlib.Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode:
            injector.step()
        return original(path, mode, *args, **kwargs)

    def write_half(content: Any, file: Any, **options: Any) -> None:
        text = json.dumps(content, **options)
        file.write(text[: len(text) // 2])
        injector.step()
        file.write(text[len(text) // 2 :])

    def iterate(queue: BoundedQueue[Any]) -> Iterator[Any]:
        for item in original(queue):
            injector.step()
            yield item

    return {"open": open_for_writing, "write": write_half, "get": iterate}.get(kind, call)
