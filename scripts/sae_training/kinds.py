"""The kinds of SAE that can be trained: TopK, BatchTopK, matryoshka, JumpReLU and gated.

    sae = KINDS["jumprelu"](layer=15, k=32, mean=mean, d_sae=4096, generator=generator)
    sae.start(x)                                # x [rows, d_in], once: sets thresholds at which L0 is about k
    loss = sae_loss(sae, x, StepSettings())
    config, weights = sae.saved(mean, deviation, x)

All use the same loss: the fraction of variance unexplained, a penalty of their kind, and the part of the error that
dead latents explain (AuxK, Gao et al. 2024, arXiv 2406.04093, appendix A.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from delta_selectivity.saes.topk import exact_topk
from delta_selectivity.system.processor import has_fast_bfloat16
from scripts.sae_training.active import Codes, Pattern, active_values, decoded

Weights = dict[str, Tensor]  # W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in], and others


@dataclass(frozen=True)
class StepSettings:
    """Settings of the training steps."""

    batch: int = 2048  # activations per step
    lr: float = 2e-3
    warmup: float = 0.03  # share of the steps
    decay: float = 0.7  # share of the steps
    dead_after: int = 150_000  # tokens without firing
    k_aux: int = 64
    aux_weight: float = 1 / 32

    def rate(self, progress: float, step: float = 0.0) -> float:
        """Return the share of the learning rate at `progress` of the training: warm-up, plateau, decay to zero.

        step: the share of the training that one step is.
        """
        return min(1.0, (progress + step) / self.warmup, (1 - progress) / self.decay)


class Fit(NamedTuple):
    """What a step needs to know of an SAE's output for a batch."""

    recon: Tensor  # [rows, d_in]
    fired: Tensor  # bool [d_sae]: latents that are active in some row
    penalty: Tensor | float  # the kind's loss besides the error


class TopKSae(nn.Module):
    """pre = ReLU((x - b_dec) W_enc^T + b_enc); the k largest; recon = sum of v_j W_dec[j] + b_dec."""

    kind: ClassVar[str] = "topk"
    W_enc: nn.Parameter
    silent_for: Tensor

    def __init__(self, layer: int, k: int, mean: Tensor, d_sae: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer, self.k = layer, k
        directions = torch.randn(d_sae, len(mean), generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(directions.clone())  # [d_sae, d_in]
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(directions.clone())  # [d_sae, d_in]
        self.b_dec = nn.Parameter(mean.clone())
        self.register_buffer("silent_for", torch.zeros(d_sae))  # tokens since each latent was last active

    def start(self, x: Tensor) -> None:
        """Initialise from some activations [rows, d_in] before the first step."""

    def bias(self) -> Tensor:
        """Return b_enc - b_dec W_enc^T [d_sae]. With x - b_dec instead, a gradient would take a product over rows."""
        with torch.autocast("cpu", enabled=False):
            return self.b_enc - self.W_enc @ self.b_dec

    def pre_acts(self, x: Tensor) -> Tensor:
        """`[rows, d_in] -> [rows, d_sae]`, before the ReLU."""
        return nn.functional.linear(x, self.W_enc, self.bias())

    def codes(self, x: Tensor) -> Codes:
        """Return the active latents of x [rows, d_in]; only they have gradients."""
        bias = self.bias()
        with torch.no_grad():
            pre = nn.functional.linear(x, self.W_enc, bias).float()
            pattern = self.choose(pre)
        return Codes(pattern, active_values(pre, x, self.W_enc, bias, pattern))

    def choose(self, pre: Tensor) -> Pattern:
        """Return the k largest pre-activations of each row if they are positive."""
        values, columns = exact_topk(pre, self.k)
        row, place = (values > 0).nonzero().unbind(1)
        return Pattern(row, columns[row, place], (len(pre), pre.shape[1]))

    def decode(self, codes: Codes) -> Tensor:
        """Return the reconstruction [rows, d_in]."""
        return decoded(codes, self.W_dec) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.codes(x))

    def fit(self, x: Tensor, variance: Tensor) -> Fit:
        """Return the output for x [rows, d_in]; variance: the squared deviation of x, summed."""
        codes = self.codes(x)
        return Fit(self.decode(codes), self.fired(codes), self.penalty(x, codes, variance))

    def fired(self, codes: Codes) -> Tensor:
        """Return which latents are active in some row, bool [d_sae]."""
        fired = torch.zeros(len(self.b_enc), dtype=torch.bool)
        fired[codes.pattern.column[codes.value > 0]] = True
        return fired

    def penalty(self, x: Tensor, codes: Codes, variance: Tensor) -> Tensor | float:
        """Return the kind's loss besides the error."""
        return 0.0

    def revived(self, x: Tensor, latents: Tensor, k: int) -> Tensor:
        """Return what the k largest of some latents [n] would add to the reconstruction, `[rows, d_in]`."""
        pre = nn.functional.linear(x, self.W_enc[latents], self.bias()[latents])
        largest = pre.topk(min(k, len(latents)), dim=-1, sorted=False)
        z = torch.zeros_like(pre).scatter(-1, largest.indices, torch.relu(largest.values))
        return z @ self.W_dec[latents]

    @torch.no_grad()
    def unit_decoder(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def unscaled(self, scale: float) -> Weights:
        """Return the weights of the same SAE for inputs that are `scale` times as large."""
        return {
            "W_enc": self.W_enc.clone(),
            "b_enc": self.b_enc * scale,
            "W_dec": self.W_dec.clone(),
            "b_dec": self.b_dec * scale,
        }


class BatchTopKSae(TopKSae):
    """SAE that keeps the k x batch largest pre-activations of a batch (Bussmann et al. 2024, arXiv 2412.06410)."""

    kind = "batchtopk"

    def choose(self, pre: Tensor) -> Pattern:
        flat = pre.flatten()
        places = largest_indices(flat, self.k * len(pre))
        places = places[flat[places] > 0].sort().values
        rows, d_sae = pre.shape
        return Pattern(places // d_sae, places % d_sae, (rows, d_sae))


class MatryoshkaSae(BatchTopKSae):
    """BatchTopK SAE whose first latents also reconstruct on their own (Bussmann et al. 2025, arXiv 2503.17547)."""

    kind = "matryoshka"
    SHARES = (1 / 8, 1 / 4, 1 / 2)  # prefixes of the latents, besides all of them

    def penalty(self, x: Tensor, codes: Codes, variance: Tensor) -> Tensor | float:
        total, begin = torch.zeros(()), 0
        recon: Tensor = self.b_dec
        column = codes.pattern.column
        for share in self.SHARES:
            end = int(share * len(self.b_enc))
            part = ((column >= begin) & (column < end)).nonzero().flatten()
            recon = recon + decoded(codes.select(part), self.W_dec)
            total, begin = total + (x - recon).square().sum() / variance, end
        return total


class JumpReluSae(TopKSae):
    """SAE with z = pre where pre > threshold (Rajamanoharan et al. 2024, arXiv 2407.14435); L0 is kept at about k."""

    kind = "jumprelu"
    WIDTH = 0.5  # width of the kernel for the gradients of thresholds, in units of the first threshold
    WEIGHT = 0.5  # weight of (L0 / k - 1)^2

    def __init__(self, layer: int, k: int, mean: Tensor, d_sae: int, generator: torch.Generator) -> None:
        super().__init__(layer, k, mean, d_sae, generator)
        self.log_threshold = nn.Parameter(torch.zeros(d_sae))
        self.register_buffer("width", torch.ones(()))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        first = k_th_largest(self.pre_acts(x), self.k)
        self.log_threshold.fill_(first.log())
        self.get_buffer("width").fill_(self.WIDTH * first)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents of x [rows, d_sae] and their mean number per row; thresholds have gradients too."""
        z, l0 = _AboveThreshold.apply(self.pre_acts(x), self.log_threshold.exp(), self.get_buffer("width"))
        return z, l0

    def forward(self, x: Tensor) -> Tensor:
        return self.latents(x)[0] @ self.W_dec + self.b_dec

    def fit(self, x: Tensor, variance: Tensor) -> Fit:
        z, l0 = self.latents(x)
        fired = z.detach().amax(0) > 0
        return Fit(z @ self.W_dec + self.b_dec, fired, self.WEIGHT * (l0 / self.k - 1).square())

    @torch.no_grad()
    def unscaled(self, scale: float) -> Weights:
        return super().unscaled(scale) | {"threshold": self.log_threshold.exp() * scale}


class GatedSae(TopKSae):
    """SAE with magnitudes and gates from the same directions (Rajamanoharan et al. 2024, arXiv 2404.16014).

    The weight of the sparsity penalty follows L0, whose target is k.
    """

    kind = "gated"
    PATIENCE = 0.03  # change of the penalty's logarithm per step, per unit of log(L0 / k)

    def __init__(self, layer: int, k: int, mean: Tensor, d_sae: int, generator: torch.Generator) -> None:
        super().__init__(layer, k, mean, d_sae, generator)
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))
        self.register_buffer("weight", torch.tensor(0.01))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        self.b_enc.fill_(-k_th_largest(self.pre_acts(x), self.k))  # the bias of the gates

    def gates_and_latents(self, x: Tensor) -> tuple[Codes, Codes]:
        """Return the open gates of x [rows, d_in], and the latents in the same places; only they have gradients."""
        bias = self.bias() - self.b_enc
        with torch.no_grad():
            product = nn.functional.linear(x, self.W_enc, bias).float()
            row, column = (product + self.b_enc > 0).nonzero().unbind(1)
        pattern = Pattern(row, column, (len(product), product.shape[1]))
        value = active_values(product, x, self.W_enc, bias, pattern)
        gate, scale, shift = (p.index_select(0, column) for p in (self.b_enc, self.r_mag.exp(), self.b_mag))
        return Codes(pattern, value + gate), Codes(pattern, torch.relu(value * scale + shift))

    def codes(self, x: Tensor) -> Codes:
        return self.gates_and_latents(x)[1]

    def fit(self, x: Tensor, variance: Tensor) -> Fit:
        gates, latents = self.gates_and_latents(x)
        weight, l0 = self.get_buffer("weight"), len(gates.value) / len(x)
        too_many = math.log(max(l0 / self.k, 1e-3))
        weight.mul_(math.exp(self.PATIENCE * min(max(too_many, -1.0), 1.0)))
        l1 = gates.value.sum() / len(x) / x.shape[1] ** 0.5
        recon = decoded(gates, self.W_dec.detach()) + self.b_dec.detach()
        penalty = weight.clone() * l1 + (x - recon).square().sum() / variance
        return Fit(self.decode(latents), self.fired(latents), penalty)

    @torch.no_grad()
    def unscaled(self, scale: float) -> Weights:
        weights = super().unscaled(scale)
        return weights | {
            "b_gate": weights.pop("b_enc"),
            "r_mag": self.r_mag.clone(),
            "b_mag": self.b_mag * scale,
        }


KINDS: dict[str, type[TopKSae]] = {
    kind.kind: kind for kind in (TopKSae, BatchTopKSae, MatryoshkaSae, JumpReluSae, GatedSae)
}


class _AboveThreshold(torch.autograd.Function):
    """z = pre where pre [rows, d] > threshold [d], and mean L0; thresholds get gradients by a rectangular kernel."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        threshold = threshold.to(pre.dtype)
        open_ = pre > threshold
        ctx.save_for_backward(pre, open_, threshold, width)
        return pre * open_, open_.to(pre.dtype).sum(0, dtype=torch.float32).sum() / len(pre)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pre, open_, threshold, width = ctx.saved_tensors
        of_z, of_l0 = gradients
        near = (pre - threshold).abs_() < width / 2
        of_threshold = near * (of_z * pre + (of_l0 / len(pre)).to(pre.dtype))
        return of_z * open_, -of_threshold.sum(0, dtype=torch.float32) / width, None


def largest_indices(flat: Tensor, n: int) -> Tensor:
    """Return the indices of the n largest of many values; a sample excludes most, which is faster than `topk`."""
    sample = flat[:: max(1, len(flat) // 2**16)]
    rank = 2 * n * len(sample) // len(flat) + 64
    if rank < len(sample):
        low = sample.kthvalue(len(sample) - rank).values
        candidates = (flat > low).nonzero().flatten()
        if len(candidates) >= n:
            return candidates[flat[candidates].topk(n, sorted=False).indices]
    return flat.topk(n, sorted=False).indices


def k_th_largest(pre: Tensor, k: int) -> Tensor:
    """Return the value that k entries per row of pre [rows, d_sae] exceed on average."""
    flat = pre.flatten()
    return flat[largest_indices(flat, k * len(pre))].min()


def _products_in_bfloat16() -> torch.autocast:
    """Return a context with products in bfloat16 where the CPU computes in it, and in float32 elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16())


def sae_loss(sae: TopKSae, x: Tensor, settings: StepSettings) -> Tensor:
    """Return the fraction of variance unexplained on the batch, plus the kind's penalty and AuxK."""
    variance = (x - x.mean(0)).square().sum()
    with _products_in_bfloat16():
        recon, fired, penalty = sae.fit(x, variance)
    error = (x - recon).float()
    sae.silent_for += len(x)
    sae.silent_for[fired] = 0
    dead = (sae.silent_for > settings.dead_after).nonzero().flatten()
    loss = error.square().sum() / variance + penalty
    if len(dead) == 0:
        return loss
    with _products_in_bfloat16():
        revived = sae.revived(x, dead, settings.k_aux)
    return loss + settings.aux_weight * (error.detach() - revived).float().square().sum() / variance


def train_step(sae: TopKSae, optimiser: torch.optim.Optimizer, x: Tensor, settings: StepSettings) -> float:
    """Do one step on x [rows, d_in]; return its loss."""
    optimiser.zero_grad(set_to_none=True)
    loss = sae_loss(sae, x, settings)
    loss.backward()
    optimiser.step()
    sae.unit_decoder()
    return loss.item()
