"""Construction of coders from SAE Lens's weights without the library."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import Coder, LinearCoder, SkipCoder, fold_b_dec
from delta_selectivity.saes.files import Shapes
from delta_selectivity.saes.sae_lens.config import BATCH_TOPK, LensConfig
from delta_selectivity.saes.sae_lens.scaling import InputScaling, Whitening
from delta_selectivity.saes.selection import Gated, Selection, Threshold, TopK

JUMPRELU = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
SKIP = ("skip_transcoder", "jumprelu_skip_transcoder")


@dataclass(frozen=True)
class _Linear:
    """The encoder's and decoder's linear maps during construction."""

    W_enc: Tensor  # [d_sae, d_in]
    b_enc: Tensor  # [d_sae]; the gate's bias in a gated SAE
    W_dec: Tensor  # [d_sae, d_out]
    b_dec: Tensor  # [d_out]

    def scaled(self, factor: float) -> _Linear:
        """Fold in a factor that multiplies inputs and divides outputs."""
        return _Linear(self.W_enc * factor, self.b_enc, self.W_dec / factor, self.b_dec / factor)

    def rescaled(self) -> _Linear:
        """Normalise the decoder's rows and multiply the pre-activations by their norms."""
        norms = self.W_dec.norm(dim=1).clamp(min=1e-8)
        W_enc, W_dec = self.W_enc * norms.unsqueeze(1), self.W_dec / norms.unsqueeze(1)
        return replace(self, W_enc=W_enc, b_enc=self.b_enc * norms, W_dec=W_dec)

    def unwhitened(self, whitening: Whitening, *, subtracts_b_dec: bool) -> _Linear:
        """Fold in the whitening of inputs. Uses float64, because the inverse of small variances is large."""
        mean, matrix, inverse = (t.double() for t in (whitening.mean, whitening.matrix, whitening.inverse))
        W_enc, b_enc = self.W_enc.double() @ matrix.T, self.b_enc.double()
        moved = _Linear(
            W_enc=W_enc,
            b_enc=b_enc if subtracts_b_dec else b_enc - W_enc @ mean,  # the new b_dec includes the mean
            W_dec=self.W_dec.double() @ inverse,
            b_dec=self.b_dec.double() @ inverse + mean,
        )
        return _Linear(moved.W_enc.float(), moved.b_enc.float(), moved.W_dec.float(), moved.b_dec.float())


def expected_shapes(lens: LensConfig, names: set[str]) -> Shapes:
    """Return the names and shapes that a native architecture needs, given the names in the file."""
    latents = (lens.d_sae,)
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (lens.d_in, lens.d_sae),
        "W_dec": (lens.d_sae, lens.d_out),
        "b_dec": (lens.d_out,),
    }
    if lens.architecture == "gated":
        return shapes | {"b_gate": latents, "b_mag": latents, "r_mag": latents}
    shapes["b_enc"] = latents
    if lens.architecture in SKIP:
        shapes["W_skip"] = (lens.d_out, lens.d_in)
    if lens.architecture in BATCH_TOPK and "threshold" not in names:
        shapes["topk_threshold"] = ()
    elif lens.architecture == "jumprelu" and "log_threshold" in names:
        shapes["log_threshold"] = latents
    elif lens.architecture in (*JUMPRELU, *BATCH_TOPK):
        shapes["threshold"] = latents
    return shapes


def build_native(lens: LensConfig, tensors: dict[str, Tensor], scaling: InputScaling | None = None) -> Coder:
    """Build a coder from float32 tensors with SAE Lens's names and shapes, with all input scaling folded in."""
    finetuned = tensors.get("scaling_factor")
    if finetuned is not None and not torch.allclose(finetuned, torch.ones_like(finetuned)):
        raise RequestError(
            f"{lens.path}: it was finetuned with a scaling_factor, which neither this program nor SAE Lens 6 supports"
        )
    scaling = scaling or InputScaling()
    b_enc = tensors["b_gate"] if lens.architecture == "gated" else tensors["b_enc"]
    linear = _Linear(tensors["W_enc"].T, b_enc, tensors["W_dec"], tensors["b_dec"]).scaled(scaling.factor)
    if lens.rescale_acts_by_decoder_norm:
        linear = linear.rescaled()
    if scaling.whitening is not None:
        linear = linear.unwhitened(scaling.whitening, subtracts_b_dec=lens.apply_b_dec_to_input)
    W_enc, bias = linear.W_enc.contiguous(), linear.b_enc
    if lens.apply_b_dec_to_input:
        bias = fold_b_dec(W_enc, bias, linear.b_dec)
    coder: Coder = LinearCoder(W_enc, bias, linear.W_dec, linear.b_dec, _selection(lens, tensors, scaling.factor))
    return SkipCoder(coder, tensors["W_skip"]) if lens.architecture in SKIP else coder


def _selection(lens: LensConfig, tensors: dict[str, Tensor], scaling_factor: float) -> Selection:
    if lens.architecture == "topk":
        assert lens.k is not None
        return TopK(lens.k)
    if lens.architecture == "gated":
        gain = tensors["r_mag"].exp()
        return Gated(gain, offset=tensors["b_mag"] - gain * tensors["b_gate"])
    threshold = torch.zeros(lens.d_sae, dtype=torch.float32)
    if "threshold" in tensors:
        threshold = tensors["threshold"]
    elif "log_threshold" in tensors:
        threshold = tensors["log_threshold"].exp()
    elif "topk_threshold" in tensors:
        # The unit is pre-activation times decoder norm, and the decoder was divided by the factor.
        divisor = scaling_factor if lens.rescale_acts_by_decoder_norm else 1.0
        threshold = (tensors["topk_threshold"] / divisor).expand(lens.d_sae).clone()
    return Threshold(threshold.clamp(min=0))
