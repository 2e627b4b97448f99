"""Find the widths of hook points without weights, by a forward pass on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from delta_selectivity.errors import RequestError
from delta_selectivity.models.capture import capture
from delta_selectivity.models.configs import configured_width
from delta_selectivity.models.places import LAYER, Site, find_tap

N_TEXTS, N_TOKENS = 2, 11  # differ from usual numbers of heads, so that [texts, heads, ...] is not mistaken for tokens


def shape_widths(build: Callable[[], nn.Module], config: Any, sites: Collection[Site]) -> dict[Site, int]:
    """Return the width d of each site. `build` makes the decoder of `config`, with the layers that the sites need.

    No memory is allocated for weights and nothing is computed. If a family's code needs actual values, the width of a
    named hook point comes from the config, and that of a path from its linear layer or, without one, from d_model.

    Raises `RequestError` if a hook point does not exist, is not run, or does not have one row per token.
    """
    with FakeTensorMode():
        decoder = build().eval()
        taps = {site: find_tap(decoder, site) for site in sites}
        try:
            with torch.inference_mode(), capture(taps, N_TEXTS, N_TOKENS) as found:
                decoder(input_ids=torch.zeros(N_TEXTS, N_TOKENS, dtype=torch.long), use_cache=False)
        except RequestError:
            raise
        except Exception:  # code may fail in many ways on tensors without values
            return {site: _width_without_values(tap.module, tap.side, config, site) for site, tap in taps.items()}
    refuse_unused(sites, found)
    return {site: int(found[site].shape[-1]) for site in sites}


def refuse_unused(sites: Collection[Site], found: Collection[Site]) -> None:
    """Raise `RequestError` if a forward pass did not run through one of the sites."""
    for site in sites:
        if site not in found:
            raise RequestError(
                f"`hookpoint` {site.hookpoint}: the model does not run that module in layer {site.layer}"
            )


def _width_without_values(module: nn.Module, side: str, config: Any, site: Site) -> int:
    if LAYER not in site.hookpoint and site.hookpoint != "mlp_post":
        return configured_width(config, site.hookpoint)
    width = getattr(module, "in_features" if side == "input" else "out_features", None)
    return int(width) if width is not None else configured_width(config, site.hookpoint)
