"""The caller's description of an SAE in memory, and its validation."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.hookpoints import HookPoint, canonical, parse, same_place
from delta_selectivity.saes.source import SaeHeader

DEFAULT_PLACE = "resid_post"
_KINDS = {"prepend_bos": bool, "trained_on_bos": bool, "model_name": str, "architecture": str}


@dataclass(frozen=True)
class WrapArguments:
    """The arguments of ``wrap_sae`` that describe an SAE; None if not given."""

    layer: int | None = None
    hookpoint: str | None = None
    d_in: int | None = None
    d_out: int | None = None
    k: int | None = None
    architecture: str | None = None
    prepend_bos: bool | None = None
    trained_on_bos: bool | None = None
    model_name: str | None = None
    context_size: int | None = None
    input_hookpoint: str | None = None
    scaling_factor: float | None = None

    def checked(self) -> WrapArguments:
        """Return a copy with plain numbers and canonical hook points. Raises `RequestError` at an invalid value."""
        for field, kind in _KINDS.items():
            _check_kind(field, getattr(self, field), kind)
        place, reads = (self._place(field) for field in ("hookpoint", "input_hookpoint"))
        layer = _whole_number("layer", self.layer, at_least=0)
        if place is not None and place.layer is not None:
            if layer not in (None, place.layer):
                raise RequestError(f"`layer` {layer}: `hookpoint` {self.hookpoint} names layer {place.layer}")
            layer = place.layer
        if reads is not None and same_place(reads.name, DEFAULT_PLACE if place is None else place.name):
            reads = None  # an autoencoder, which reads what it reconstructs
        return replace(
            self,
            layer=layer,
            hookpoint=None if place is None else place.name,
            input_hookpoint=None if reads is None else reads.name,
            d_in=_whole_number("d_in", self.d_in),
            d_out=_whole_number("d_out", self.d_out),
            k=_whole_number("k", self.k),
            context_size=_whole_number("context_size", self.context_size),
            scaling_factor=_factor(self.scaling_factor),
        )

    def hook(self, label: str, default: str | None = DEFAULT_PLACE) -> HookPoint:
        """Return the hook point of an object that does not name one. Raises `RequestError` if it was not given either.

        Args:
            label: name of the object in messages.
            default: the hook point if none was given; None if it is required.
        """
        if self.layer is None:
            raise RequestError(f"`layer` is missing: {label} does not name its layer")
        place = self.hookpoint or default
        if place is None:
            raise RequestError(f"`hookpoint` is missing: {label} does not name the module whose output it predicts")
        return HookPoint(self.layer, place)

    def complete(self, header: SaeHeader, *, says_bos: bool) -> SaeHeader:
        """Return a header completed with the caller's values. Raises `RequestError` if they contradict it.

        Args:
            header: metadata of the object itself.
            says_bos: whether ``header.counts_bos`` comes from the object.
        """
        counts_bos = header.counts_bos if says_bos else None
        _agree("d_out", self.d_out, header.d_out)
        return replace(
            header,
            layer=_agree("layer", self.layer, header.layer),
            hookpoint=_agree_on_place("hookpoint", self.hookpoint, header.hookpoint),
            input_hookpoint=self._reads(header),
            d_in=_agree("d_in", self.d_in, header.d_in),
            k=self._k(header),
            architecture=_agree("architecture", self.architecture, header.architecture),
            prepend_bos=_agree("prepend_bos", self.prepend_bos, header.prepend_bos),
            counts_bos=bool(_agree("trained_on_bos", self.trained_on_bos, counts_bos)),
            model_name=self._model_name(header),
            context_size=_agree("context_size", self.context_size, header.context_size),
        )

    def refuse_scaling(self) -> None:
        """Raise `RequestError` if a scaling factor was given; for objects that do not use one."""
        if self.scaling_factor is not None:
            raise RequestError(f"`scaling_factor` {self.scaling_factor}: this object does not use one")

    def _place(self, field: str) -> _Place | None:
        given = getattr(self, field)
        if given is None:
            return None
        if not isinstance(given, str) or not given.strip():
            raise RequestError(
                f"`{field}` is {given!r}, but must be the name of a hook point, such as resid_post or mlp_out"
            )
        hook = parse(given)
        return _Place(canonical(given), None) if hook is None else _Place(hook.place, hook.layer)

    def _k(self, header: SaeHeader) -> int | None:
        if self.k is not None and header.k is None:
            raise RequestError(f"`k` {self.k}: the object does not have a fixed number of latents per activation")
        return header.k if self.k is None else int(_agree("k", self.k, header.k))

    def _reads(self, header: SaeHeader) -> str | None:
        found, given = header.input_hookpoint, self.input_hookpoint
        if given is not None and found is None and not same_place(given, header.hookpoint):
            raise RequestError(f"`input_hookpoint` {given}: the object is an autoencoder, not a transcoder")
        return found if found is None else _agree_on_place("input_hookpoint", given, found)

    def _model_name(self, header: SaeHeader) -> str | None:
        """Return the model's name; owners are not compared, because the libraries leave them out."""
        given, found = (None if name is None else Path(name).name for name in (self.model_name, header.model_name))
        if given is not None and found is not None and given.lower() != found.lower():
            raise _contradiction("model_name", self.model_name, header.model_name)
        return header.model_name if self.model_name is None else self.model_name


@dataclass(frozen=True)
class _Place:
    name: str
    layer: int | None  # None if it was given without a layer


def _check_kind(field: str, given: Any, kind: type) -> None:
    if given is not None and not isinstance(given, kind):
        raise RequestError(f"`{field}` is {given!r}, but must be of type {kind.__name__}")


def _whole_number(field: str, given: Any, at_least: int = 1) -> int | None:
    if given is None:
        return None
    try:
        number = operator.index(given)  # accepts NumPy integers
    except TypeError:
        number = at_least - 1
    if isinstance(given, bool) or number < at_least:
        raise RequestError(f"`{field}` is {given!r}, but must be a whole number, at least {at_least}")
    return number


def _factor(given: Any) -> float | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < torch.finfo(torch.float32).max:
        raise RequestError(f"`scaling_factor` is {given!r}, but must be a number above 0")
    return float(given)


def _agree(field: str, given: Any, found: Any) -> Any:
    if given is not None and found is not None and given != found:
        raise _contradiction(field, given, found)
    return given if found is None else found


def _agree_on_place(field: str, given: str | None, found: str) -> str:
    if given is not None and not same_place(given, found):
        raise _contradiction(field, given, found)
    return found


def _contradiction(field: str, given: Any, found: Any) -> RequestError:
    return RequestError(f"`{field}` is {given}, but the object says {found}")
