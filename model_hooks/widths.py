"""Widths of places in a model before any weight is read: a forward pass of its shapes alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from errors import RequestError
from model_hooks.capture import capture
from model_hooks.configs import configured_width
from model_hooks.places import LAYER, Site, Tap, find_tap

log = logging.getLogger(__name__)

N_TEXTS, N_TOKENS = 2, 11  # unlike the numbers of heads, so that [texts, heads, ...] is not taken for tokens


def shape_widths(build: Callable[[], nn.Module], config: Any, sites: Collection[Site]) -> dict[Site, int]:
    """Width d of each site. `build` makes the decoder of `config`, with as many layers as the sites need.

    Weights take no memory and nothing is computed. Where a family's code needs numbers to run, named hook points
    have the width that the config says, and paths those of a linear map or, failing that, d_model.

    Raises `RequestError` if a hook point does not exist, is not run, or holds something else than one row a token.
    """
    found = _shapes(build, sites)
    if found is None:
        with torch.device("meta"):
            decoder = build()
        return {site: _said_width(find_tap(decoder, site), config, site) for site in sites}
    refuse_unused(sites, found)
    return {site: int(found[site].shape[-1]) for site in sites}


def _shapes(build: Callable[[], nn.Module], sites: Collection[Site]) -> dict[Site, Tensor] | None:
    """Tensors without numbers as they stand at the sites; None if the family's code needs numbers to run."""
    for without_numbers in (lambda: torch.device("meta"), _fake_tensors):  # more code runs on the latter
        try:
            return _forward(build, sites, without_numbers())
        except RequestError:
            raise
        except Exception as error:  # whatever the family's code makes of tensors without numbers
            log.info("shapes alone do not run: %s", error)
    return None


def _fake_tensors() -> AbstractContextManager[Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode  # here: with what it imports it takes more than a second

    return FakeTensorMode()


def _forward(
    build: Callable[[], nn.Module], sites: Collection[Site], without_numbers: AbstractContextManager[Any]
) -> dict[Site, Tensor]:
    with without_numbers, torch.inference_mode():
        decoder = build().eval()
        with capture({site: find_tap(decoder, site) for site in sites}, N_TEXTS, N_TOKENS) as found:
            decoder(input_ids=torch.zeros(N_TEXTS, N_TOKENS, dtype=torch.long), use_cache=False)
    return found


def refuse_unused(sites: Collection[Site], found: Collection[Site]) -> None:
    """Raises `RequestError` if the model ran without passing through one of the sites."""
    for site in sites:
        if site not in found:
            raise RequestError(
                f"--hookpoint {site.hookpoint}: the model runs without that module in layer {site.layer}"
            )


def _said_width(tap: Tap, config: Any, site: Site) -> int:
    if LAYER not in site.hookpoint:
        return configured_width(config, site.hookpoint)
    told = getattr(tap.module, "in_features" if tap.side == "input" else "out_features", None)
    return int(told) if told is not None else configured_width(config, site.hookpoint)
