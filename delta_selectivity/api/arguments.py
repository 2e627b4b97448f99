"""Turn what callers may write for SAEs, tasks, layers and devices into the parts of a request."""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.run.request import choose_devices, parse_layers
from delta_selectivity.saes import SaeSource, open_sae, wrap_sae
from delta_selectivity.tasks import GurneeData, Task, TaskName, UserData, name_task

Layers = int | str | Iterable[int] | None
Devices = str | tuple[str, str]


def as_tasks(tasks: Any) -> tuple[TaskName, ...]:
    """Return one task or several as a request takes them."""
    several = [tasks] if isinstance(tasks, str | os.PathLike | GurneeData | Task | UserData) else list(tasks)
    known = GurneeData | Task | UserData
    return tuple(task if isinstance(task, known) else name_task(os.fspath(task)) for task in several)


def as_layers(layers: Layers) -> tuple[int, ...] | None:
    """Return layers as a request takes them: one, several, or as the command line writes them."""
    if layers is None or isinstance(layers, str):
        return None if layers is None else parse_layers(layers)
    several = list(layers) if isinstance(layers, Iterable) else [layers]
    for layer in several:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or layer < 0:
            raise RequestError(f"`layers` {layer!r}: give whole numbers from 0")
    return tuple(sorted({int(layer) for layer in several}))


def as_saes(saes: Any, layers: tuple[int, ...] | None, hookpoint: str | None) -> tuple[str | SaeSource, ...]:
    """Return one SAE or several, names and objects, as a request takes them."""
    several = list(saes) if isinstance(saes, list | tuple) else [saes]
    return tuple(
        os.fspath(sae) if isinstance(sae, str | os.PathLike) else as_source(sae, layers, hookpoint) for sae in several
    )


def as_source(sae: Any, layers: tuple[int, ...] | None, hookpoint: str | None) -> SaeSource:
    """Return a name or an object as an SAE; where it does not say its layer, that of the only one asked for."""
    if isinstance(sae, SaeSource):
        return sae
    if isinstance(sae, str | os.PathLike):
        return open_sae(os.fspath(sae), hookpoint)
    try:
        return wrap_sae(sae)
    except RequestError as error:
        if error.field not in {"layer", "hookpoint"}:
            raise RequestError(str(error).replace("`obj`", "`saes`")) from error
    one = layers[0] if layers is not None and len(layers) == 1 else None
    return wrap_sae(sae, layer=one, hookpoint=hookpoint)


def as_devices(device: Devices) -> tuple[str, str]:
    """Return the devices of model and probes. Raises `RequestError` for one that is not there."""
    if device == "auto":
        return choose_devices(None, None)
    if isinstance(device, str):
        return choose_devices(device, device)
    if len(device) != 2:
        raise RequestError(f"`device` {device!r}: give one device, or two: of the model and of the probes")
    return choose_devices(*device)


def as_path(path: str | os.PathLike[str] | None) -> Path | None:
    """Return a path with ``~`` resolved."""
    return None if path is None else Path(path).expanduser()
