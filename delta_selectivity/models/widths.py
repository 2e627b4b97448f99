"""Find the widths of hook points without weights, by a forward pass on meta tensors."""

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

N_TEXTS, N_TOKENS = 2, 11  # unlike the numbers of heads, so that [texts, heads, ...] is not taken for tokens


def shape_widths(build: Callable[[], nn.Module], config: Any, sites: Collection[Site]) -> dict[Site, int]:
    """Width d of each site. `build` makes the decoder of `config`, with as many layers as the sites need.

    Weights take no memory and nothing is computed. Where a family's code needs numbers to run, named hook points
    have the width that the config says, and paths those of a linear map or, failing that, d_model.

    Raises `RequestError` if a hook point does not exist, is not run, or holds something else than one row a token.
    """
    with FakeTensorMode():
        decoder = build().eval()
        taps = {site: find_tap(decoder, site) for site in sites}
        try:
            with torch.inference_mode(), capture(taps, N_TEXTS, N_TOKENS) as found:
                decoder(input_ids=torch.zeros(N_TEXTS, N_TOKENS, dtype=torch.long), use_cache=False)
        except RequestError:
            raise
        except Exception:  # whatever the family's code makes of tensors without numbers
            return {site: _said_width(tap.module, tap.side, config, site) for site, tap in taps.items()}
    refuse_unused(sites, found)
    return {site: int(found[site].shape[-1]) for site in sites}


def refuse_unused(sites: Collection[Site], found: Collection[Site]) -> None:
    """Raises `RequestError` if the model ran without passing through one of the sites."""
    for site in sites:
        if site not in found:
            raise RequestError(
                f"`hookpoint` {site.hookpoint}: the model runs without that module in layer {site.layer}"
            )


def _said_width(module: nn.Module, side: str, config: Any, site: Site) -> int:
    if LAYER not in site.hookpoint and site.hookpoint != "mlp_post":
        return configured_width(config, site.hookpoint)
    told = getattr(module, "in_features" if side == "input" else "out_features", None)
    return int(told) if told is not None else configured_width(config, site.hookpoint)
