"""Input scalings that SAE Lens stores next to a training checkpoint.

``SAE.load_from_disk`` ignores them; ``SAE.from_pretrained`` folds in a scaling factor from its list.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.files import check_shapes, read_config, read_tensors
from delta_selectivity.saes.sae_lens.config import LensConfig

SCALER = "activation_scaler.json"
"""Holds the factor of ``expected_average_only_in``."""
WHITENING = "activation_whitening.safetensors"
"""Holds the matrices of ``covariance_whitening``."""

_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Whitening:
    """The whitening z = (x - mean) @ matrix and its inverse x = z @ inverse + mean (arXiv 2511.13981)."""

    mean: Tensor  # [d_in]
    matrix: Tensor  # [d_in, d_in]
    inverse: Tensor  # [d_in, d_in]


@dataclass(frozen=True)
class InputScaling:
    """The transformation of activations before the SAE in training; at most one of the two."""

    factor: float = 1.0
    whitening: Whitening | None = None


def check_scaling(lens: LensConfig) -> None:
    """Check that the constants required by a config are present. Raises `RequestError` if not."""
    if lens.normalize_activations == "covariance_whitening":
        _check_whitening(lens)
    else:
        _factor(lens)


def read_scaling(lens: LensConfig) -> InputScaling:
    """Read the constants next to a config. Raises `RequestError` if required ones are missing or broken."""
    if lens.normalize_activations != "covariance_whitening":
        return InputScaling(factor=_factor(lens))
    tensors = read_tensors(_check_whitening(lens))
    return InputScaling(whitening=Whitening(tensors["mean"], tensors["matrix"], tensors["inverse_matrix"]))


def _factor(lens: LensConfig) -> float:
    if lens.normalize_activations != "expected_average_only_in":
        return 1.0
    path = lens.path.with_name(SCALER)
    factor = read_config(path).get("scaling_factor") if path.is_file() else None
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < _FLOAT32_MAX:
        raise RequestError(
            f"{lens.path}: normalize_activations is 'expected_average_only_in', but the file has no scaling factor:"
            f' add a file {SCALER} next to it: {{"scaling_factor": sqrt(d_in) divided by the mean norm of the training'
            " activations}"
        )
    return float(factor)


def _check_whitening(lens: LensConfig) -> Path:
    path = lens.path.with_name(WHITENING)
    if not path.is_file():
        raise RequestError(
            f"{lens.path}: normalize_activations is 'covariance_whitening', but a training checkpoint does not have its"
            f" matrices: add its {WHITENING} next to it, or save the inference model"
        )
    square = (lens.d_in, lens.d_in)
    check_shapes(path, {"mean": (lens.d_in,), "matrix": square, "inverse_matrix": square})
    return path
