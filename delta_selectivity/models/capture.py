"""Capture or replace the inputs and outputs of modules during a forward pass; hooks are always removed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.models.places import Site, Tap


@contextlib.contextmanager
def capture(
    taps: Mapping[Site, Tap], n_texts: int, n_tokens: int, tokens: Tensor | None = None
) -> Iterator[dict[Site, Tensor]]:
    """Collect the value `[n_texts, n_tokens, d]` at every tap that the model computes inside the context.

    Only passes of the current thread are captured, since several threads may run the model.

    Args:
        taps: Tap of each site.
        n_texts: Number of texts per forward pass.
        n_tokens: Number of tokens per text, including padding.
        tokens: Keep only the value `[n, d]` at these tokens: int64 [n], text x n_tokens + position.

    Raises:
        RequestError: From inside the forward pass, if a module's value does not have one row per token.
    """
    found: dict[Site, Tensor] = {}
    owner = threading.get_ident()

    def keep(site: Site, tap: Tap, value: Any) -> None:
        if threading.get_ident() == owner:
            x = _per_token(site, value, n_texts, n_tokens)
            if tap.change is not None:
                x = tap.change(x)
            elif tokens is None:
                x = x.clone()  # Falcon adds to its MLP's output in place
            found[site] = x if tokens is None else x.flatten(0, 1).index_select(0, tokens)

    handles = []
    try:
        for site, tap in taps.items():
            handles.append(_attach(site, tap, keep))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _attach(site: Site, tap: Tap, keep: Any) -> Any:
    """Register `keep` as a hook at the tap, and return its handle."""
    if tap.side == "output":

        def after(_module: Any, _args: Any, output: Any) -> None:
            keep(site, tap, output if isinstance(output, Tensor) else output[0])

        return tap.module.register_forward_hook(after)

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(site, tap, _received(args, kwargs))

    return tap.module.register_forward_pre_hook(before, with_kwargs=True)


def _received(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the first tensor argument of a module, preferring `hidden_states` among keyword arguments."""
    named = (kwargs["hidden_states"],) if "hidden_states" in kwargs else tuple(kwargs.values())
    return next((value for value in (*args, *named) if isinstance(value, Tensor)), None)


@contextlib.contextmanager
def replacing(site: Site, tap: Tap, n_texts: int, n_tokens: int, place: Tensor, rows: Tensor) -> Iterator[None]:
    """Replace the value at the tap by `rows` [n, d] in forward passes inside the context.

    Only passes of the current thread are affected.

    Args:
        site: The site that the tap belongs to.
        tap: Module input or output to replace.
        n_texts: Number of texts per forward pass.
        n_tokens: Number of tokens per text, including padding.
        place: int64 [n], text x n_tokens + position of each row; other positions keep their values.
        rows: The new values [n, d].

    Raises:
        RequestError: As for `capture`.
    """
    owner = threading.get_ident()

    def put(value: Any) -> Any:
        x = _per_token(site, value, n_texts, n_tokens)
        changed = x.flatten(0, 1).index_copy(0, place, rows.to(x.dtype))
        return changed.reshape(value.shape)

    def after(_module: Any, _args: Any, output: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        return put(output) if isinstance(output, Tensor) else (put(output[0]), *output[1:])

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != owner:
            return None
        old = _received(args, kwargs)
        new = put(old)
        swapped = {name: new if value is old else value for name, value in kwargs.items()}
        return tuple(new if value is old else value for value in args), swapped

    hook = tap.module.register_forward_hook(after) if tap.side == "output" else None
    handle = hook or tap.module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _per_token(site: Site, value: Any, n_texts: int, n_tokens: int) -> Tensor:
    """Return a module's value as `[n_texts, n_tokens, d]`: heads concatenated, flattened texts separated."""
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    if shape is not None and len(shape) >= 3 and shape[:2] == (n_texts, n_tokens):
        return value.flatten(2)
    if shape is not None and len(shape) == 2 and shape[0] == n_texts * n_tokens:
        return value.unflatten(0, (n_texts, n_tokens))
    found = f"shape {list(shape)}" if shape is not None else f"type {type(value).__name__}"
    raise RequestError(
        f"`hookpoint` {site.hookpoint}: its value has {found}, not one row for each of {n_texts} x {n_tokens} tokens"
    )
