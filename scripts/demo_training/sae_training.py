"""Train all TopK SAEs of the demo at once, from one stream of activations, in a given number of minutes.

Each layer has one SAE per k. In training, the input is scaled to unit mean square; the scale is folded into the biases
at the end, so the saved SAEs take raw activations. BOS is excluded: its activation is an outlier that would take
latents away from words. Dead latents learn from the residual (AuxK, Gao et al. 2024, arXiv 2406.04093, appendix A.2).
Neither library's trainer runs several k over one forward pass on a CPU, so this module has its own loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from scripts.sae_training.kinds import StepSettings, TopKSae, train_step

from .streams import TextMix

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaeSettings:
    """Settings of the training of the SAEs."""

    minutes: float
    step: StepSettings = field(default_factory=StepSettings)
    seed: int = 0
    d_sae: int = 1024
    ks: tuple[int, ...] = (8, 32)
    length: int = 192  # tokens per row, BOS included
    rows: int = 16  # per forward pass
    buffer_rows: int = 192  # rows that are shuffled together
    workers: int = 2


@dataclass(frozen=True)
class Quality:
    """The quality of one SAE on held-out tokens."""

    layer: int
    k: int
    fvu: float
    l0: float
    dead: float  # share of latents that never fire on the held-out tokens


Residuals = Callable[[Tensor], Tensor]  # token ids [rows, length] -> [layers, rows, length, d_in]


@contextmanager
def residual_stream(model: GPTNeoXForCausalLM) -> Iterator[Residuals]:
    """Return a function that computes the residual stream after every layer, before the final LayerNorm.

    Several threads may call it at the same time: the hooks are set once, and each thread keeps its own outputs.
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
    """Return `[layers, tokens, d_in]`: every position whose token is not BOS."""
    return acts[:, ids != bos].float()


def shuffled_batches(
    residuals: Residuals, bos: int, mix: TextMix, settings: SaeSettings, pool: ThreadPoolExecutor
) -> Iterator[Tensor]:
    """Yield batches `[layers, batch, d_in]` from a pool of rows, half of which is replaced each time."""
    generator = torch.Generator().manual_seed(settings.seed)
    kept: list[Tensor] = []
    rows, batch = settings.buffer_rows, settings.step.batch
    while True:
        texts = [mix.batch(settings.rows, settings.length) for _ in range(rows // settings.rows)]
        kept += pool.map(lambda ids: without_bos(residuals(ids), ids, bos), texts)
        buffer = torch.cat(kept, dim=1)
        buffer = buffer[:, torch.randperm(buffer.shape[1], generator=generator)]
        half = buffer.shape[1] // 2
        yield from (part for part in buffer[:, :half].split(batch, 1) if part.shape[1] == batch)
        kept, rows = [buffer[:, half:]], settings.buffer_rows // 2


@torch.no_grad()
def quality(sae: TopKSae, acts: Tensor) -> Quality:
    """Return the quality of the SAEs; `acts` is `[layers, tokens, d_in]`, held out."""
    x = acts[sae.layer]
    error, l0, fired = 0.0, 0.0, torch.zeros(len(sae.b_enc), dtype=torch.bool)
    for part in x.split(4096):
        codes = sae.codes(part)
        error += (part - sae.decode(codes)).square().sum().item()
        l0 += len(codes.value)
        fired[codes.pattern.column] = True
    variance = (x - x.mean(0)).square().sum().item()
    return Quality(sae.layer, sae.k, error / variance, l0 / len(x), 1 - fired.float().mean().item())


def train_saes(
    residuals: Residuals, bos: int, mix: TextMix, held_out_rows: Tensor, settings: SaeSettings
) -> tuple[list[TopKSae], Tensor, list[Quality], int]:
    """Return the SAEs (for scaled input), the scale of each layer, their quality, and the number of tokens."""
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
    optimisers = [torch.optim.Adam(sae.parameters(), lr=settings.step.lr, fused=True) for sae in saes]
    tokens, step = 0, 0
    for batch in batches:
        progress = (time.monotonic() - start) / 60 / settings.minutes
        if progress >= 1:
            break
        x = batch / scale[:, None, None]
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = settings.step.lr * settings.step.rate(progress)
        losses = list(pool.map(lambda s, o, x=x: train_step(s, o, x[s.layer], settings.step), saes, optimisers))
        tokens, step = tokens + batch.shape[1], step + 1
        if step % 50 == 0:
            silent = [int((sae.silent_for > settings.step.dead_after).sum()) for sae in saes]
            log.info("%d tokens  losses %s  dead %s", tokens, [round(loss, 3) for loss in losses], silent)
    held_out = torch.cat(
        [without_bos(residuals(ids), ids, bos) for ids in held_out_rows.split(16)],
        1,
    )
    found = list(pool.map(lambda sae: quality(sae, held_out / scale[:, None, None]), saes))
    pool.shutdown()
    return saes, scale, found, tokens
