"""Check on a few tokens that the hook points of a loaded model have the values that their names say.

Hook points are found by module names. A model family may use such a name for something else, normalise or scale the
module's output before adding it to the residual stream, or attend to later tokens. Each check is a short forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from delta_selectivity.errors import RequestError
from delta_selectivity.models.capture import capture
from delta_selectivity.models.norms import is_affine_of
from delta_selectivity.models.places import LAYER, Site, Tap, block_of, find_tap, names_of_modules, norm_before
from delta_selectivity.models.widths import refuse_unused

N_TOKENS = 8
ADDED = ("attn_out", "mlp_out")
SUMS = {"resid_post": ("resid_pre", *ADDED), "resid_mid": ("resid_pre", "attn_out")}


def check(decoder: Any, taps: Mapping[Site, Tap], device: torch.device) -> None:
    """Raise `RequestError` if a site is not computed, depends on later tokens, or differs from what its name says."""
    ids = _two_texts(decoder.get_input_embeddings().num_embeddings).to(device)
    found = _run(decoder, taps, ids)
    refuse_unused(taps, found)
    for site, x in found.items():
        _refuse_lookahead(decoder, site, x)
    for layer in sorted({site.layer for site in taps if site.hookpoint in ADDED}):
        _check_sum(decoder, Site(layer, "resid_post"), ids)
    for site in taps:
        if site.hookpoint == "resid_mid":
            _check_sum(decoder, site, ids)
    for site in taps:
        if site.hookpoint.endswith("_normalized") and LAYER not in site.hookpoint:
            _check_norm(decoder, site, found[site], ids)


def _two_texts(vocab_size: int) -> Tensor:
    """Return random token ids, int64 [2, N_TOKENS], with the same first half in both texts."""
    ids = torch.randint(vocab_size, (2, N_TOKENS), generator=torch.Generator().manual_seed(0))
    ids[1, : N_TOKENS // 2] = ids[0, : N_TOKENS // 2]
    return ids


@torch.inference_mode()
def _run(decoder: nn.Module, taps: Mapping[Site, Tap], ids: Tensor) -> dict[Site, Tensor]:
    with capture(taps, *ids.shape) as found:
        decoder(input_ids=ids, use_cache=False)
    return found


def _refuse_lookahead(decoder: nn.Module, site: Site, x: Tensor) -> None:
    """Raise `RequestError` if the activations of a common prefix differ between two texts: the model is not causal."""
    a, b = x[:, : N_TOKENS // 2].float()
    difference = (a - b).norm(dim=-1) / a.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    if float(difference.max()) > torch.finfo(x.dtype).eps ** 0.5:
        raise RequestError(
            f"{type(decoder).__name__}: {site.hookpoint} of layer {site.layer} depends on later tokens, so this is "
            "not a causal decoder, and texts cannot be padded and probed"
        )


def _check_sum(decoder: nn.Module, total: Site, ids: Tensor) -> None:
    """Raise `RequestError` unless resid_pre + attn_out + mlp_out is resid_post, up to rounding of the sums.

    This holds in parallel and in serial blocks. In serial blocks, resid_mid is resid_pre + attn_out.
    """
    parts = [Site(total.layer, name) for name in SUMS[total.hookpoint]]
    found = _run(decoder, {site: find_tap(decoder, site) for site in (*parts, total)}, ids)
    terms, after = [found[site].float() for site in parts], found[total].float()
    off = (sum(terms) - after).abs()
    size = sum(term.abs() for term in (*terms, after))
    if bool((off > 4 * torch.finfo(found[total].dtype).eps * size).any()):
        named = "mlp_out, attn_out" if total.hookpoint == "resid_post" else total.hookpoint
        raise RequestError(
            f"`hookpoint` {named}: in {type(block_of(decoder, total.layer)).__name__} "
            f"{' + '.join(SUMS[total.hookpoint])} is not {total.hookpoint} (off by up to {float(off.max()):.3g}): give "
            f"a module path with {LAYER}, such as {', '.join(names_of_modules(decoder))}"
        )


def _check_norm(decoder: nn.Module, site: Site, normalised: Tensor, ids: Tensor) -> None:
    """Raise `RequestError` unless the module's input is the normalised value times a weight plus a bias."""
    part = Site(site.layer, site.hookpoint.replace("normalized", "in"))
    norm = norm_before(block_of(decoder, site.layer), site.hookpoint)
    read = _run(decoder, {part: find_tap(decoder, part)}, ids)[part]
    if not is_affine_of(read, normalised, norm, tolerance=8 * torch.finfo(read.dtype).eps):
        raise RequestError(
            f"`hookpoint` {site.hookpoint}: {type(norm).__name__} is not a norm, a weight and a bias before "
            f"{part.hookpoint}: give a module path with {LAYER}"
        )
