"""Support for SAEs during training with SAE Lens, whose trainer scales activations before encoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.object_state import attempt, runnable_copy


def scaled(sae: Any, activation_scaler: Any) -> Any:
    """Return the SAE for unscaled activations, with the trainer's scaling folded in; the SAE itself if there is none.

    Args:
        sae: An SAE of SAE Lens.
        activation_scaler: The trainer's ``ActivationScaler``, with a factor or the matrices of a whitening.

    Raises:
        RequestError: the SAE cannot fold in a scaling.
    """
    factor, whitening = (getattr(activation_scaler, name, None) for name in ("scaling_factor", "whitening"))
    if factor is None and whitening is None:
        return sae
    label = type(sae).__name__
    if not isinstance(sae, nn.Module) or not hasattr(sae, "fold_activation_norm_scaling_factor"):
        raise RequestError(
            f"`sae` {label}: its trainer scales activations, but it has no method to fold in the scaling"
        )
    folded: Any = runnable_copy(sae, label, share=False)
    if factor is not None:
        attempt(
            f"`sae` {label}: fold_activation_norm_scaling_factor", folded.fold_activation_norm_scaling_factor, factor
        )
    if whitening is not None:
        matrices = whitening.mean, whitening.matrix, whitening.inverse_matrix
        attempt(f"`sae` {label}: fold_activation_whitening", folded.fold_activation_whitening, *matrices)
    return folded


def diverged(sae: Any) -> bool:
    """Return whether a weight of a module is NaN or infinite."""
    parameters = sae.parameters() if isinstance(sae, nn.Module) else ()
    return not all(torch.isfinite(parameter).all() for parameter in parameters)
