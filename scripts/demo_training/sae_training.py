"""Trains all the demo's TopK SAEs at once, from one stream of activations, in a given number of minutes.

Every layer's residual stream meets one SAE per k. Input is scaled to unit mean square while training and
the scale folded into the biases at the end, so the saved SAEs take raw activations. BOS is left out:
its activation is an outlier that would take latents away from words. Dead latents learn from the
residual (AuxK, Gao et al. 2024, arXiv 2406.04093, appendix A.2).
Neither library's trainer runs several k over one forward pass on a CPU, hence this loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM

from .streams import TextMix

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaeSettings:
    """What was chosen for the training of the SAEs."""

    minutes: float
    seed: int = 0
    d_sae: int = 1024
    ks: tuple[int, ...] = (8, 32)
    length: int = 192  # tokens a row, BOS included
    rows: int = 16  # in a forward pass
    buffer_rows: int = 192  # rows shuffled together
    batch: int = 2048  # activations a step
    lr: float = 2e-3
    warmup: float = 0.03  # share of the time
    decay: float = 0.7  # share of the time
    dead_after: int = 150_000  # tokens without firing
    k_aux: int = 64
    aux_weight: float = 1 / 32
    workers: int = 2


@dataclass(frozen=True)
class Quality:
    """What one SAE does on held-out tokens."""

    layer: int
    k: int
    fvu: float
    l0: float
    dead: float  # share of latents that never fire on the held-out tokens


class TopKSae(nn.Module):
    """pre = ReLU((x - b_dec) W_enc^T + b_enc); the k largest; recon = sum of v_j W_dec[j] + b_dec."""

    def __init__(self, layer: int, k: int, mean: Tensor, d_sae: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer, self.k = layer, k
        directions = torch.randn(d_sae, len(mean), generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(directions.clone())  # [d_sae, d_in]
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(directions.clone())  # [d_sae, d_in]
        self.b_dec = nn.Parameter(mean.clone())
        self.silent_for = torch.zeros(d_sae)  # tokens since each latent last fired

    def pre_acts(self, x: Tensor) -> Tensor:
        """`[rows, d_in] -> [rows, d_sae]`"""
        return torch.relu((x - self.b_dec) @ self.W_enc.T + self.b_enc)

    def latents(self, pre: Tensor, k: int) -> Tensor:
        """The k largest of each row, the rest zero; `[rows, d_sae]`."""
        values, indices = pre.topk(k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def forward(self, x: Tensor) -> Tensor:
        return self.latents(self.pre_acts(x), self.k) @ self.W_dec + self.b_dec

    @torch.no_grad()
    def unit_decoder(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def unscaled(self, scale: float) -> dict[str, Tensor]:
        """The weights of the same SAE for inputs `scale` times as large."""
        return {
            "W_enc": self.W_enc.clone(),
            "b_enc": self.b_enc * scale,
            "W_dec": self.W_dec.clone(),
            "b_dec": self.b_dec * scale,
        }


Residuals = Callable[[Tensor], Tensor]  # token ids [rows, length] -> [layers, rows, length, d_in]


@contextmanager
def residual_stream(model: GPTNeoXForCausalLM) -> Iterator[Residuals]:
    """A function that gives the residual stream after every layer, before the final LayerNorm.

    Several threads may call it at once: the hooks are set once, and each thread keeps its own outputs.
    """
    mine = threading.local()
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, out: mine.layers.append(out))
        for layer in model.gpt_neox.layers
    ]

    def run(ids: Tensor) -> Tensor:
        mine.layers = []
        with torch.no_grad():
            model.gpt_neox(ids, use_cache=False)
        return torch.stack(mine.layers)

    try:
        yield run
    finally:
        for hook in hooks:
            hook.remove()


def without_bos(acts: Tensor, ids: Tensor, bos: int) -> Tensor:
    """`[layers, tokens, d_in]`: every position whose token is not BOS."""
    return acts[:, ids != bos].float()


def shuffled_batches(
    residuals: Residuals, bos: int, mix: TextMix, settings: SaeSettings, pool: ThreadPoolExecutor
) -> Iterator[Tensor]:
    """Batches `[layers, batch, d_in]` from a pool of rows, the half of it new each time."""
    generator = torch.Generator().manual_seed(settings.seed)
    kept: list[Tensor] = []
    rows = settings.buffer_rows
    while True:
        texts = [mix.batch(settings.rows, settings.length) for _ in range(rows // settings.rows)]
        kept += pool.map(lambda ids: without_bos(residuals(ids), ids, bos), texts)
        buffer = torch.cat(kept, dim=1)
        buffer = buffer[:, torch.randperm(buffer.shape[1], generator=generator)]
        half = buffer.shape[1] // 2
        yield from (part for part in buffer[:, :half].split(settings.batch, 1) if part.shape[1] == settings.batch)
        kept, rows = [buffer[:, half:]], settings.buffer_rows // 2


def sae_loss(sae: TopKSae, x: Tensor, settings: SaeSettings) -> Tensor:
    """Fraction of variance unexplained on the batch, plus what the dead latents leave of the error."""
    variance = (x - x.mean(0)).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        pre = sae.pre_acts(x)
        z = sae.latents(pre, sae.k)
        error = x - (z @ sae.W_dec + sae.b_dec)
    with torch.no_grad():
        sae.silent_for += len(x)
        sae.silent_for[(z > 0).any(0)] = 0
        dead = (sae.silent_for > settings.dead_after).nonzero().flatten()
    loss = error.float().square().sum() / variance
    if len(dead) == 0:
        return loss
    k_aux = min(settings.k_aux, len(dead))
    target = error.detach().float()
    revived = sae.latents(pre[:, dead].float(), k_aux) @ sae.W_dec[dead]
    return loss + settings.aux_weight * (target - revived).square().sum() / variance


def train_step(sae: TopKSae, optimiser: torch.optim.Optimizer, x: Tensor, settings: SaeSettings) -> float:
    optimiser.zero_grad(set_to_none=True)
    loss = sae_loss(sae, x, settings)
    loss.backward()
    optimiser.step()
    sae.unit_decoder()
    return loss.item()


@torch.no_grad()
def quality(sae: TopKSae, acts: Tensor) -> Quality:
    """`acts` is `[layers, tokens, d_in]`, held out."""
    x = acts[sae.layer]
    error, l0, fired = 0.0, 0.0, torch.zeros(len(sae.b_enc), dtype=torch.bool)
    for part in x.split(4096):
        z = sae.latents(sae.pre_acts(part), sae.k)
        error += (part - (z @ sae.W_dec + sae.b_dec)).square().sum().item()
        l0 += (z > 0).sum().item()
        fired |= (z > 0).any(0)
    variance = (x - x.mean(0)).square().sum().item()
    return Quality(sae.layer, sae.k, error / variance, l0 / len(x), 1 - fired.float().mean().item())


def train_saes(
    residuals: Residuals, bos: int, mix: TextMix, held_out_rows: Tensor, settings: SaeSettings
) -> tuple[list[TopKSae], Tensor, list[Quality], int]:
    """The SAEs (for scaled input), the scale of each layer, their quality, and the tokens they saw."""
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(settings.workers)
    generator = torch.Generator().manual_seed(settings.seed)
    batches = shuffled_batches(residuals, bos, mix, settings, pool)
    start = time.monotonic()
    first = next(batches)
    mean = first.mean(1)
    scale = (first - mean[:, None]).square().mean((1, 2)).sqrt()  # [layers]
    saes = [
        TopKSae(layer, k, mean[layer] / scale[layer], settings.d_sae, generator)
        for layer in range(len(first))
        for k in settings.ks
    ]
    optimisers = [torch.optim.Adam(sae.parameters(), lr=settings.lr, fused=True) for sae in saes]
    tokens, step = 0, 0
    for batch in batches:
        progress = (time.monotonic() - start) / 60 / settings.minutes
        if progress >= 1:
            break
        x = batch / scale[:, None, None]
        for optimiser in optimisers:
            warm_or_late = min(1.0, progress / settings.warmup, (1 - progress) / settings.decay)
            optimiser.param_groups[0]["lr"] = settings.lr * warm_or_late
        losses = list(pool.map(lambda s, o, x=x: train_step(s, o, x[s.layer], settings), saes, optimisers))
        tokens, step = tokens + batch.shape[1], step + 1
        if step % 50 == 0:
            silent = [int((sae.silent_for > settings.dead_after).sum()) for sae in saes]
            log.info("%d tokens  losses %s  dead %s", tokens, [round(loss, 3) for loss in losses], silent)
    held_out = torch.cat(
        [without_bos(residuals(ids), ids, bos) for ids in held_out_rows.split(16)],
        1,
    )
    found = list(pool.map(lambda sae: quality(sae, held_out / scale[:, None, None]), saes))
    pool.shutdown()
    return saes, scale, found, tokens
