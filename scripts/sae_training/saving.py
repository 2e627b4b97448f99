"""Save trained SAEs in SAE Lens's folder format, measure the saved files, and write their card."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from delta_selectivity.saes import Sae, load_sae
from scripts.demo_training.sae_files import sae_lens_topk, write_sae_lens
from scripts.sae_training.harvest import HELD_OUT, TRAIN, Activations
from scripts.sae_training.training import Trained, TrainSettings

SAVED_AS = {"gated": "gated", "jumprelu": "jumprelu", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}
NAMES = {
    "topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "matryoshka BatchTopK", "jumprelu": "JumpReLU",
    "gated": "gated",
}  # fmt: skip


@dataclass(frozen=True)
class Quality:
    """The quality of a saved SAE on held-out tokens, without BOS and sinks."""

    fvu: float
    l0: float
    dead: float  # share of latents that never fire there
    tokens: int


def save(
    trained: Trained, acts: Activations, settings: TrainSettings, model: str, about: str, output: Path
) -> tuple[Path, Quality]:
    """Write one SAE below `output`, measured from the files on disk, and the card of the folder of its kind and k.

    model: its name; about: a sentence about the text.
    """
    folder = output / f"{trained.kind}-k{trained.k}"
    hook = f"blocks.{trained.layer}.hook_resid_post"
    architecture: dict[str, object]
    architecture = sae_lens_topk(trained.k) if trained.kind == "topk" else {"architecture": SAVED_AS[trained.kind]}
    metadata: dict[str, object] = {
        "model_name": model,
        "hook_name": hook,
        "model_from_pretrained_kwargs": {
            "fold_ln": False,
            "center_writing_weights": False,
            "center_unembed": False,
        },
        "context_size": acts.settings["length"],
        "prepend_bos": acts.facts["bos"] is not None,
        "exclude_special_tokens": True,
        "training_tokens": settings.steps * settings.step.batch,
        "different_tokens": min(settings.steps * settings.step.batch, acts.tokens(TRAIN)),
        "trained_as": trained.kind,
        "l0": trained.k,
    }
    write_sae_lens(folder / hook, trained.weights, architecture, metadata)
    measured = quality(load_sae(str(folder), trained.layer), acts, trained.layer)
    write_sae_lens(folder / hook, trained.weights, architecture, metadata | {"held_out": asdict(measured)})
    text = card(trained.kind, trained.k, folder, acts, settings, model, about)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder, measured


def quality(sae: Sae, acts: Activations, layer: int) -> Quality:
    """Return FVU, L0 and dead latents on the held-out tokens."""
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

On the residual stream **after** a layer (`blocks.<layer>.hook_resid_post`, before any final norm), {d_sae} latents, in
SAE Lens's folder format, matrices in bfloat16. Input is the raw activation of the Hugging Face model: no normalisation,
no folding of weights.

{text}

On held-out tokens (of documents that were not trained on), by the saved weights in float32:

| layer | trained on, M tokens | of them different | FVU | L0 | dead | held-out tokens |
|---|---|---|---|---|---|---|
{table}

FVU is the fraction of variance unexplained; dead is the share of the latents that never fired on the held-out tokens.
These are short trainings: published SAEs see hundreds of times as many tokens. `scripts/train_saes.py` made them.
"""

TEXT = (
    "Text: {about} Rows of {length} tokens that {bos}. Left out of training and of the figures: BOS, and attention "
    "sinks (tokens whose norm is above 10 times the median). Adam, batches of {batch}, learning rate {lr:g}, AuxK "
    "against dead latents.{matched}"
)
MATCHED = " Thresholds were set so that L0 is as said on training tokens; on other text it differs a little."


def card(kind: str, k: int, folder: Path, acts: Activations, settings: TrainSettings, model: str, about: str) -> str:
    """Return the README of a folder, from the config of each SAE in it."""
    rows = []
    for path in folder.glob("*/cfg.json"):
        said = json.loads(path.read_text(encoding="utf-8"))["metadata"]
        if found := said.get("held_out"):
            tokens, different = (f"{said[key] / 1e6:.2f}" for key in ("training_tokens", "different_tokens"))
            figures = f"{found['fvu']:.3f} | {found['l0']:.1f} | {found['dead']:.1%} | {found['tokens']:,}"
            rows.append((int(said["hook_name"].split(".")[1]), f"{tokens} | {different} | {figures}"))
    text = TEXT.format(
        about=about,
        length=acts.settings["length"],
        bos="begin with BOS" if acts.facts["bos"] is not None else "begin without BOS, which this model has not",
        batch=settings.step.batch,
        lr=settings.step.lr,
        matched="" if kind == "topk" else MATCHED,
    )
    return CARD.format(
        name=NAMES[kind],
        model=model,
        about_k=f"k = {k}" if kind == "topk" else f"an L0 of {k}",
        d_sae=settings.d_sae,
        text=textwrap.fill(text, 118, break_on_hyphens=False),
        table="\n".join(f"| {layer} | {row} |" for layer, row in sorted(rows)),
    )
