"""Saves trained SAEs in SAE Lens's folder format, measures what was saved, and writes its card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from delta_selectivity.saes import Sae, load_sae
from scripts.demo_training.sae_files import sae_lens_topk, write_sae_lens
from scripts.sae_training.harvest import HELD_OUT, Activations
from scripts.sae_training.training import Trained, TrainSettings

SAVED_AS = {"gated": "gated", "jumprelu": "jumprelu", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}
NAMES = {
    "topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "matryoshka BatchTopK", "jumprelu": "JumpReLU",
    "gated": "gated",
}  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """What a saved SAE does on held-out tokens, BOS and sinks left out."""

    fvu: float
    l0: float
    dead: float  # share of latents that never fire there
    tokens: int


def save(trained: Trained, acts: Activations, settings: TrainSettings, model: str, output: Path) -> Path:
    """Write one SAE below `output`, and return the folder of its kind and k."""
    folder = output / f"{trained.kind}-k{trained.k}"
    hook = f"blocks.{trained.layer}.hook_resid_post"
    harvested = acts.facts["settings"]
    assert isinstance(harvested, dict)
    metadata = {
        "model_name": model,
        "hook_name": hook,
        "model_from_pretrained_kwargs": {
            "fold_ln": False,
            "center_writing_weights": False,
            "center_unembed": False,
        },
        "context_size": harvested["length"],
        "prepend_bos": acts.facts["bos"] is not None,
        "exclude_special_tokens": True,
        "training_tokens": settings.steps * settings.step.batch,
        "l0": trained.k,
    }
    architecture: dict[str, object]
    architecture = sae_lens_topk(trained.k) if trained.kind == "topk" else {"architecture": SAVED_AS[trained.kind]}
    write_sae_lens(folder / hook, trained.weights, architecture, metadata)
    return folder


def measure(folder: Path, layer: int, acts: Activations) -> Quality:
    """Of what is on disk, as Delta Selectivity reads it."""
    return quality(load_sae(str(folder), layer), acts, layer)


def quality(sae: Sae, acts: Activations, layer: int) -> Quality:
    """FVU, L0 and dead latents on the held-out tokens."""
    error, l0, n = 0.0, 0, 0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    total, squares = torch.zeros(sae.d_in, dtype=torch.float64), 0.0
    for shard in range(acts.shards(HELD_OUT)):
        for x in acts.read(HELD_OUT, shard, layer).float().split(4096):
            codes = sae.encode(x)
            error += (x - sae.decode(codes, x)).double().square().sum().item()
            l0 += int(codes.l0().sum())
            fired[codes.col[codes.value != 0].long()] = True
            total += x.double().sum(0)
            squares += x.double().square().sum().item()
            n += len(x)
    variance = squares - (total.square().sum() / n).item()
    return Quality(error / variance, l0 / n, 1 - fired.double().mean().item(), n)


CARD = """\
---
library_name: sae_lens
tags: [sae]
---

# {name} SAEs for {model}, {about_k}

Residual stream after layer{plural} {layers} (`blocks.<layer>.hook_resid_post`, the output of the layer, before any
final norm), {d_sae} latents, in SAE Lens's folder format, matrices in bfloat16. Input is the raw activation of the
Hugging Face model: no normalisation, no folding of weights.

**Trained on {tokens:.2f} M tokens**, {passes}: {about} Texts are cut into rows of {length} tokens that
{bos}. Left out of training and of the figures below: BOS, and attention sinks (tokens whose norm is above 10
times the median). Adam, batches of {batch}, learning rate {lr:g}, AuxK against dead latents.

On {held_out:,} held-out tokens (whole documents that were not trained on), by the saved weights in float32:

| layer | FVU | L0 | dead |
|---|---|---|---|
{table}

FVU is the fraction of variance unexplained; dead is the share of the latents that never fired on those tokens.
This is a short training: published SAEs see hundreds of times as many tokens. `scripts/train_saes.py` made them.
"""


def card(
    kind: str,
    k: int,
    found: Sequence[tuple[int, Quality]],
    acts: Activations,
    settings: TrainSettings,
    model: str,
    about: str,
) -> str:
    """The README of a folder; found: (layer, quality) of each of its SAEs; about: the text, a sentence."""
    harvested = acts.facts["settings"]
    assert isinstance(harvested, dict)
    tokens, there = settings.steps * settings.step.batch, acts.tokens("train")
    times = tokens / there
    return CARD.format(
        name=NAMES[kind],
        model=model,
        about_k=f"k = {k}" if kind == "topk" else f"trained for an L0 of {k}",
        plural="s" if len(found) > 1 else "",
        layers=", ".join(str(layer) for layer, _ in found),
        d_sae=settings.d_sae,
        tokens=tokens / 1e6,
        passes="each seen once" if times <= 1 else f"{there / 1e6:.2f} M different ones, seen {times:.1f} times each",
        about=about,
        length=harvested["length"],
        bos="begin with BOS" if acts.facts["bos"] is not None else "begin without BOS, which this model has not",
        batch=settings.step.batch,
        lr=settings.step.lr,
        held_out=found[0][1].tokens,
        table="\n".join(f"| {layer} | {q.fvu:.3f} | {q.l0:.1f} | {q.dead:.1%} |" for layer, q in found),
    )
