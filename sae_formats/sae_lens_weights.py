"""Weights in SAE Lens's names and shapes as a coder, without importing the library."""

from __future__ import annotations

import torch
from torch import Tensor

from errors import RequestError
from sae_formats.coders import Coder, LinearCoder, fold_b_dec
from sae_formats.files import read_config
from sae_formats.input_norm import InputNorm
from sae_formats.sae_lens_config import LensConfig
from sae_formats.selection import Gated, Selection, Threshold, TopK

SCALER = "activation_scaler.json"
"""Written beside a training checkpoint; holds the factor that ``expected_average_only_in`` needs."""

FLOAT32_MAX = torch.finfo(torch.float32).max


def build_native(lens: LensConfig, tensors: dict[str, Tensor], scaling_factor: float = 1.0) -> tuple[Coder, InputNorm]:
    """A coder from float32 tensors in SAE Lens's names and shapes, everything that can be folded in folded."""
    finetuned = tensors.get("scaling_factor")
    if finetuned is not None and not torch.allclose(finetuned, torch.ones_like(finetuned)):
        raise RequestError(f"{lens.path}: finetuned with a scaling_factor, which SAE Lens 6 cannot apply either")
    W_enc = tensors["W_enc"].T * scaling_factor
    W_dec = tensors["W_dec"] / scaling_factor
    b_dec = tensors["b_dec"] / scaling_factor
    b_enc = tensors["b_gate"] if lens.architecture == "gated" else tensors["b_enc"]
    if lens.rescale_acts_by_decoder_norm:
        norms = W_dec.norm(dim=1).clamp(min=1e-8)
        W_enc, b_enc, W_dec = W_enc * norms.unsqueeze(1), b_enc * norms, W_dec / norms.unsqueeze(1)
    selection = _selection(lens, tensors, scaling_factor)
    bias = fold_b_dec(W_enc, b_enc, b_dec) if lens.apply_b_dec_to_input else b_enc
    norm = lens.normalize_activations
    input_norm: InputNorm = "none" if norm == "expected_average_only_in" else norm
    return LinearCoder(W_enc.contiguous(), bias, W_dec, b_dec, selection), input_norm


def _selection(lens: LensConfig, tensors: dict[str, Tensor], scaling_factor: float) -> Selection:
    if lens.architecture == "topk":
        assert lens.k is not None
        return TopK(lens.k)
    if lens.architecture == "gated":
        gain = tensors["r_mag"].exp()
        return Gated(gain, offset=tensors["b_mag"] - gain * tensors["b_gate"])
    threshold = torch.zeros(lens.d_sae)
    if "threshold" in tensors:
        threshold = tensors["threshold"]
    elif "log_threshold" in tensors:
        threshold = tensors["log_threshold"].exp()
    elif "topk_threshold" in tensors:
        # In units of pre-activation times decoder norm, and the decoder was divided by the factor.
        divisor = scaling_factor if lens.rescale_acts_by_decoder_norm else 1.0
        threshold = (tensors["topk_threshold"] / divisor).expand(lens.d_sae).clone()
    return Threshold(threshold.clamp(min=0))


def scaling_factor_of(lens: LensConfig) -> float:
    """The factor of ``expected_average_only_in``, 1 without. Loading from disk, the library would leave it out."""
    if lens.normalize_activations != "expected_average_only_in":
        return 1.0
    path = lens.path.with_name(SCALER)
    factor = read_config(path).get("scaling_factor") if path.is_file() else None
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < FLOAT32_MAX:
        raise RequestError(
            f"{lens.path}: normalize_activations is 'expected_average_only_in', so activations are scaled by one"
            f' number, which is not in the file; put it beside it as {SCALER}: {{"scaling_factor": sqrt(d_in) divided'
            " by the mean norm of the training activations}"
        )
    return float(factor)
