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
from delta_selectivity.settings import Settings
from delta_selectivity.tasks import GurneeData, Task, TaskName, UserData, name_task

Layers = int | str | Iterable[int] | None
Devices = str | tuple[str, str]


def as_tasks(tasks: Any) -> tuple[TaskName, ...]:
    """Return one task or several as a request takes them."""
    known = GurneeData | Task | UserData
    several = list(tasks) if isinstance(tasks, Iterable) and not isinstance(tasks, str | os.PathLike) else [tasks]
    for task in several:
        if not isinstance(task, str | os.PathLike | known):
            raise RequestError(f"`tasks` {task!r}: give a name, a path, or what load_task returns")
    return tuple(task if isinstance(task, known) else name_task(os.fspath(task)) for task in several)


def as_model(model: Any) -> str:
    """Return a model's name as a request takes it."""
    if not isinstance(model, str | os.PathLike):
        raise RequestError(f"`model` is a {type(model).__name__}: give a hub id or a folder, not an object")
    return os.fspath(model)


def as_settings(settings: Any) -> Settings:
    """Return the settings, found to be some."""
    if not isinstance(settings, Settings):
        raise RequestError(f"`settings` is a {type(settings).__name__}: give Settings(...)")
    return settings


def as_layers(layers: Layers) -> tuple[int, ...] | None:
    """Return layers as a request takes them: one, several, or as the command line writes them."""
    if layers is None or isinstance(layers, str):
        return None if layers is None else parse_layers(layers)
    several = list(layers) if isinstance(layers, Iterable) else [layers]
    if not several:
        raise RequestError("`layers` is empty: name at least one, or None for all")
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


def as_source(
    sae: Any, layers: tuple[int, ...] | None, hookpoint: str | None, d_in: int | None = None, field: str = "saes"
) -> SaeSource:
    """Return a name or an object as an SAE; where it does not say its layer, that of the only one asked for.

    d_in: Width of an object that does not show it. field: The caller's name for the SAE, for errors.
    """
    if isinstance(sae, SaeSource):
        return sae
    if isinstance(sae, str | os.PathLike):
        return open_sae(os.fspath(sae), hookpoint)
    known: dict[str, Any] = {}
    one = layers[0] if layers is not None and len(layers) == 1 else None
    unsaid = {"layer": one, "hookpoint": hookpoint, "d_in": d_in}
    while True:  # what the object does not say itself is added when it is asked for
        try:
            return wrap_sae(sae, **known)
        except RequestError as error:
            if error.field in unsaid and unsaid[error.field] is not None and error.field not in known:
                known[error.field] = unsaid[error.field]
                continue
            hint = ": give one layer, or wrap_sae(sae, layer=...)" if error.field == "layer" else ""
            raise RequestError(f"{str(error).replace('`obj`', f'`{field}`')}{hint}") from error


def as_devices(device: Devices) -> tuple[str, str]:
    """Return the devices of model and probes. Raises `RequestError` for one that is not there."""
    if device == "auto":
        return choose_devices(None, None)
    if isinstance(device, str):
        return _chosen(device, device)
    if len(device) != 2:
        raise RequestError(f"`device` {device!r}: give one device, or two: of the model and of the probes")
    return _chosen(*device)


def _chosen(model: str, probes: str) -> tuple[str, str]:
    try:
        return choose_devices(model, probes)
    except RequestError as error:
        raise RequestError(str(error).replace(f"`{error.field}`", "`device`")) from error


def as_path(path: str | os.PathLike[str] | None) -> Path | None:
    """Return a path with ``~`` resolved."""
    return None if path is None else Path(path).expanduser()
