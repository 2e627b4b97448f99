"""What some SAEs do to an activation before encoding it, and undo after decoding.

The names are SAE Lens's: https://github.com/decoderesearch/SAELens, ``saes/sae.py``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

InputNorm = Literal["none", "constant_norm_rescale", "layer_norm"]


class Normalised(NamedTuple):
    """An input as the encoder sees it, and the way back: ``recon * scale + shift``."""

    x: Tensor
    """``[rows, d_in]``."""
    scale: Tensor | None
    """``[rows]``, or None for 1."""
    shift: Tensor | None
    """``[rows]``, or None for 0."""


def normalise(x: Tensor, kind: InputNorm) -> Normalised:
    """Normalise each row of float32 ``[rows, d_in]``."""
    if kind == "none":
        return Normalised(x, None, None)
    if kind == "constant_norm_rescale":
        # Where SAE Lens divides zero by zero, a row of zeros stays zero.
        norm = x.norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        scale = norm / x.shape[1] ** 0.5
        return Normalised(x / scale.unsqueeze(1), scale, None)
    mean = x.mean(dim=1)
    centred = x - mean.unsqueeze(1)
    std = centred.std(dim=1)
    return Normalised(centred / (std.unsqueeze(1) + 1e-5), std, mean)
