"""Convert the SAEs, tasks, layers and devices that callers pass into the parts of a request."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import GeneratorType
from typing import Any

import torch

from delta_selectivity.errors import FIELD, RequestError
from delta_selectivity.run.request import choose_devices, parse_layers
from delta_selectivity.saes import SaeSource, open_sae, wrap_sae
from delta_selectivity.settings import Settings
from delta_selectivity.tasks import TASK_GROUPS, GurneeData, Task, TaskName, UserData, name_task

Layers = int | str | Iterable[int] | None
Devices = str | torch.device | tuple[str | torch.device, str | torch.device]


@contextmanager
def renaming_fields(**fields: str) -> Iterator[None]:
    """Rename the fields in errors raised inside; fields: field of the called function -> argument of the caller."""
    try:
        yield
    except RequestError as error:
        renamed = FIELD.sub(lambda match: f"`{fields.get(match[1], match[1])}`", str(error))
        if renamed == str(error):
            raise
        raise RequestError(renamed) from error


def as_settings(settings: Any) -> Settings:
    """Return `settings` itself. Raises `RequestError` if it is not a `Settings`."""
    if not isinstance(settings, Settings):
        raise RequestError(f"`settings` is a {type(settings).__name__}: give Settings(folds=3, ...)")
    return settings


def as_model(model: Any) -> str:
    """Return a model's name or folder."""
    return str(_checked_path(model, "model", "a hub id or a folder"))


def as_tasks(tasks: Any) -> tuple[TaskName, ...]:
    """Return one task or several in the form that a request takes."""
    task_types = GurneeData | Task | UserData
    if isinstance(tasks, str) and "," in tasks and not os.path.exists(os.path.expanduser(tasks)):  # noqa: PTH110, PTH111
        tasks = [name.strip() for name in tasks.split(",") if name.strip()]  # same syntax as on the command line
    items = list(tasks) if isinstance(tasks, Iterable) and not isinstance(tasks, str | bytes | task_types) else [tasks]
    if not items:
        raise RequestError("`tasks` is empty: give at least one task")
    named = [task if isinstance(task, task_types) else _checked_path(task, "tasks", "a name, a file") for task in items]
    tasks_of_each = (TASK_GROUPS.get(task, (task,)) if isinstance(task, str) else (task,) for task in named)
    names = [name_task(task) if isinstance(task, str) else task for tasks in tasks_of_each for task in tasks]
    return tuple(task for place, task in enumerate(names) if not (isinstance(task, str) and task in names[:place]))


def as_layer(layer: Any, field: str = "layer") -> int:
    """Return a layer, counted from 0, as a Python int; integers of NumPy and torch are accepted."""
    try:
        number = -1 if isinstance(layer, bool) else operator.index(layer)
    except TypeError:
        number = -1
    if number < 0:
        raise RequestError(f"`{field}` {layer!r}: give a whole number of at least 0")
    return number


def as_layers(layers: Layers) -> tuple[int, ...] | None:
    """Return one layer, several, or a command-line specification in the form that a request takes."""
    if layers is None or isinstance(layers, str):
        return None if layers is None else parse_layers(layers)
    try:
        items: list[Any] = list(layers)  # type: ignore[arg-type]
    except TypeError:  # a single number of Python, NumPy or torch
        items = [layers]
    if not items:
        raise RequestError("`layers` is empty: give at least one layer, or None for every layer that an SAE has")
    return tuple(sorted({as_layer(layer, "layers") for layer in items}))


def as_saes(saes: Any, layers: tuple[int, ...] | None, hookpoint: str | None) -> tuple[str | SaeSource, ...]:
    """Return one SAE or several, names or objects, in the form that a request takes."""
    items = list(saes) if isinstance(saes, list | tuple | GeneratorType) else [saes]
    return tuple(
        os.fspath(sae) if isinstance(sae, str | os.PathLike) else as_source(sae, layers, hookpoint) for sae in items
    )


def as_source(
    sae: Any,
    layers: tuple[int, ...] | None,
    hookpoint: str | None,
    d_in: int | None = None,
    input_hookpoint: str | None = None,
) -> SaeSource:
    """Return a name or an object as an `SaeSource`; an object without a layer takes the only requested one.

    Args:
        sae: A name, an `SaeSource`, or an object that `wrap_sae` accepts.
        layers: The requested layers; None: every layer that the SAE has.
        hookpoint: Hook point of an SAE that does not define its own.
        d_in: Width of an object whose width is unknown.
        input_hookpoint: Input of a transcoder that does not define its own.

    Raises:
        RequestError: The object is not an SAE, or needs an argument that is not given.
    """
    if isinstance(sae, SaeSource):
        return sae
    if isinstance(sae, str | os.PathLike):
        return open_sae(os.fspath(sae), hookpoint)
    one = layers[0] if layers is not None and len(layers) == 1 else None
    defaults = {"layer": one, "hookpoint": hookpoint, "d_in": d_in, "input_hookpoint": input_hookpoint}
    arguments: dict[str, Any] = {}
    with renaming_fields(obj="saes"):
        while True:  # add each missing argument when `wrap_sae` needs it
            try:
                return wrap_sae(sae, **arguments)
            except RequestError as error:
                field = error.field or ""
                if field == "layer" and one is None:
                    raise RequestError(f"{error}: give one layer, or wrap_sae(sae, layer=...)") from error
                if defaults.get(field) is None or field in arguments:
                    raise
                arguments[field] = defaults[field]


def as_devices(device: Devices) -> tuple[str, str]:
    """Return the devices of model and probes. Raises `RequestError` if one does not exist."""
    devices = list(device) if isinstance(device, tuple | list) else [device]
    names = [str(name) if isinstance(name, str | torch.device) else "" for name in devices]
    if not all(names) or len(names) > 2 or (len(devices) < 2 and isinstance(device, tuple | list)):
        raise RequestError(f"`device` {device!r}: give one device, or two (for the model and for the probes)")
    with renaming_fields(device1="device", device2="device"):
        return choose_devices(None, None) if names == ["auto"] else choose_devices(names[0], names[-1])


def as_path(path: Any, field: str) -> Path:
    """Return a path with ``~`` resolved."""
    return Path(_checked_path(path, field, "a path")).expanduser()


def _checked_path(value: Any, field: str, needed: str) -> str:
    """Return a name or path as a string. Raises `RequestError` for other types and for an empty one."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and text and "\0" not in text:
            return text
    raise RequestError(f"`{field}` {value!r:.60}: {needed} is needed")
