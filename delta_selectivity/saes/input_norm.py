"""Input normalisations of SAEs, and their inverses.

``constant_norm_rescale`` and ``layer_norm`` are SAE Lens's (https://github.com/decoderesearch/SAELens,
``saes/sae.py``). ``centre`` corresponds to TransformerLens's ``center_writing_weights``, which subtracts the mean over
coordinates from the residual stream of a LayerNorm model and from everything that is added to it
(``transformer_lens_weights``). ``layer_norm`` subtracts the same mean, so it needs no ``centre`` before it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

RunTimeNorm = Literal["none", "constant_norm_rescale", "layer_norm"]
"""Normalisations in SAE Lens configs."""

InputNorm = Literal[RunTimeNorm, "centre", "centre, constant_norm_rescale"]
"""Normalisations supported here."""


class Normalised(NamedTuple):
    """A normalised input, and how to invert it: ``recon * scale + shift``."""

    x: Tensor  # [rows, d_in]
    scale: Tensor | None  # [rows], or None for 1
    shift: Tensor | None  # [rows], or None for 0


def centred(norm: RunTimeNorm) -> InputNorm:
    """Return the normalisation with centring before it."""
    if norm == "none":
        return "centre"
    return "centre, constant_norm_rescale" if norm == "constant_norm_rescale" else norm


def normalise(x: Tensor, kind: InputNorm) -> Normalised:
    """Normalise each row of float32 ``[rows, d_in]``."""
    if kind == "none":
        return Normalised(x, None, None)
    if kind == "constant_norm_rescale":
        return _rescale(x, None)
    mean = x.mean(dim=1)
    x = x - mean.unsqueeze(1)
    if kind == "centre":
        return Normalised(x, None, mean)
    if kind == "centre, constant_norm_rescale":
        return _rescale(x, mean)
    std = x.std(dim=1)
    return Normalised(x / (std.unsqueeze(1) + 1e-5), std, mean)


def _rescale(x: Tensor, shift: Tensor | None) -> Normalised:
    """Scale each row to norm sqrt(d_in). A row of zeros stays zero, where SAE Lens divides zero by zero."""
    norm = x.norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
    scale = norm / x.shape[1] ** 0.5
    return Normalised(x / scale.unsqueeze(1), scale, shift)
