"""LayerNorm and RMSNorm without weight and bias: what TransformerLens calls `hook_normalized`.

TransformerLens defines this value before the norm's weight and bias, whether or not they are folded into the
following matrices. transformers has no module there, so it is computed from the norm's input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from delta_selectivity.errors import RequestError


def bare_norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function that divides x `[..., d]` by its root mean square, after centring it for a LayerNorm.

    It computes in float32 and returns x's dtype. Raises `RequestError` if the module has no known epsilon.
    """
    epsilon = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if not isinstance(epsilon, float):
        raise RequestError(f"{type(norm).__name__} has no known epsilon: give `hookpoint` as a module path")
    centred = isinstance(norm, nn.LayerNorm)

    def normalise(x: Tensor) -> Tensor:
        wide = x.float()
        if centred:
            wide = wide - wide.mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)).to(x.dtype)

    return normalise


def is_affine_of(out: Tensor, normalised: Tensor, norm: nn.Module, tolerance: float) -> bool:
    """Return whether `out` is `normalised` times the norm's weight (Gemma: 1 + weight) plus bias, to `tolerance`."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    shift = 0.0 if bias is None else bias.float()
    gains = [1.0] if weight is None else [weight.float(), 1 + weight.float()]
    out, normalised = out.float(), normalised.float()
    off = (normalised * gain + shift - out for gain in gains)
    return any(not bool((error.abs() > tolerance * (1 + out.abs())).any()) for error in off)  # NaN is checked elsewhere
