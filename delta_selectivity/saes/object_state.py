"""Tensors and settings of an object in memory, and copies that are safe to run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.files import check_finite

Result = TypeVar("Result")

_SCALARS = (bool, int, float, str)
_MAX_DEPTH = 4
"""Nesting depth to which settings are collected; containers may contain themselves."""


def attempt(what: str, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call foreign code. Raises a one-line `RequestError` if it raises an exception or exits the process."""
    try:
        return function(*arguments)
    except RequestError:
        raise
    except SystemExit as error:
        raise RequestError(f"{what} called exit (SystemExit {error.code})") from error
    except Exception as error:
        raise RequestError(f"{what} failed: {type(error).__name__}: {' '.join(str(error).split())}") from error


def tensors_of(obj: Any, label: str) -> dict[str, Tensor]:
    """Return the tensors of an object's ``state_dict`` and a module's other buffers; empty without that method.

    Raises:
        RequestError: the method fails, or a tensor is sparse or on the meta device.
    """
    what = f"`obj` {label}: state_dict"
    method = attempt(what, getattr, obj, "state_dict", dict)
    state = attempt(what, lambda: dict(method()))
    found = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if isinstance(obj, nn.Module):
        found |= {name: buffer for name, buffer in obj.named_buffers() if name not in found}
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise RequestError(f"`obj` {label}: {name} is a {'meta' if tensor.is_meta else 'sparse'} tensor")
    return found


def as_float32(tensors: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """Return the tensors in float32 on the CPU, without a copy where they already are.

    Raises:
        RequestError: a value is not finite.
    """
    found = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}
    for name, tensor in found.items():
        check_finite(f"`obj` {label}", name, tensor)
    return found


def settings_of(obj: Any) -> list[Any]:
    """Return, as JSON-compatible data, the non-tensor state of an object that can affect its codes.

    It consists of class names and of public attributes that are numbers, strings or containers of them. For a module,
    all its submodules are included; training mode is ignored.
    """
    parts = obj.named_modules() if isinstance(obj, nn.Module) else [("", obj)]
    return [[name, type(part).__name__, _to_json(getattr(part, "__dict__", {}))] for name, part in parts]


def runnable_copy(module: nn.Module, label: str, share: bool = True) -> nn.Module:
    """Return a copy of a module in evaluation mode and float32; running it cannot modify the original.

    Parameters that are already float32 are shared with the original, unless ``share`` is off; everything else is
    copied.

    Raises:
        RequestError: the module cannot be copied.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise RequestError(f"`obj` {label}: its lazy modules have no weights yet: call it once")
    fits = all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point())
    memo: dict[int, Any] = {id(tensor): tensor.detach() for tensor in _with_history(module)}
    if fits and share:
        memo |= {id(parameter): parameter for parameter in module.parameters()}
    copied = attempt(f"`obj` {label}: copying it in evaluation mode", lambda: copy.deepcopy(module, memo).eval())
    return copied if fits else copied.to(torch.float32)


def coder_parts(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors, scalars and foreign objects inside one of this package's coders, with dotted names."""
    if is_dataclass(value) and not isinstance(value, type):
        yield f"{name}.class", type(value).__name__
        for field in fields(value):
            yield from coder_parts(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, torch.dtype):
        yield name, str(value)
    elif not isinstance(value, torch.device):  # the device does not change the coder's identity
        yield name, value


def _with_history(module: nn.Module) -> Iterator[Tensor]:
    """Yield non-leaf tensors in attributes, as a training step leaves them; ``deepcopy`` rejects these."""
    for part in module.modules():
        for value in vars(part).values():
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            yield from (tensor for tensor in inner if isinstance(tensor, Tensor) and not tensor.is_leaf)


def _to_json(value: Any, depth: int = 0) -> Any:
    """Return scalars and containers of them; None for anything else."""
    if isinstance(value, _SCALARS):
        return value
    if depth > _MAX_DEPTH:
        return None
    if is_dataclass(value) and not isinstance(value, type):
        return _to_json(vars(value), depth)
    if isinstance(value, list | tuple):
        return [_to_json(item, depth + 1) for item in value]
    if isinstance(value, dict):
        public = {str(key): _to_json(item, depth + 1) for key, item in value.items() if not str(key).startswith("_")}
        return {key: item for key, item in public.items() if item is not None and key != "training"}
    return None
