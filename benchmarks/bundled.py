"""Compute activations of a model (by default the bundled one) at the probed tokens, for the scripts in this folder.

    found = bundled.activations(mentions, layers=[3, 4])    # layer -> float32 [mentions, d]

These are the activations of `main.py`'s producer, without SAEs, queue and threads: the residual stream at the last
token of each name, with BOS first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.run.activations import CPU_TOKENS
from delta_selectivity.saes import open_sae
from delta_selectivity.tasks import Mention, batches, tokenise

MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny-pythia"


def activations(
    mentions: Sequence[Mention],
    layers: Collection[int],
    model: Path | str = MODEL,
    dtype: str = "auto",
    max_length: int | None = None,
) -> dict[int, Tensor]:
    """Return the outputs of `layers` at the last token of each mention's name: layer -> float32 [mentions, d].

    max_length: tokens that are kept of each text, if the model accepts as many; None: as many as it accepts.
    Raises `RequestError` for a layer that the model does not have, and for a model that cannot be read.
    """
    info = open_model(str(model))
    if not all(0 <= layer < info.n_layers for layer in layers):
        raise RequestError(f"layers {sorted(layers)}: {info.name} has layers 0 to {info.n_layers - 1}")
    tokenised = tokenise(
        mentions,
        info.tokenizer,
        prepend_bos=info.has_bos,
        max_length=min(max_length or info.max_length, info.max_length),
        last_only=True,
    )
    sites = [Site(layer, "resid_post") for layer in layers]
    language_model = info.load(sites, "cpu", info.choose_dtype(dtype, "cpu"))
    collected = {site: torch.empty(len(mentions), info.d_model) for site in sites}
    for batch in batches(tokenised, np.arange(len(mentions)), batch_size=len(mentions), max_tokens=CPU_TOKENS):
        wanted = torch.zeros_like(batch.ids, dtype=torch.bool)
        wanted[torch.arange(len(wanted)), batch.last] = True
        outputs = language_model.token_rows(batch.ids, batch.lengths, wanted)
        for site in sites:
            collected[site][torch.from_numpy(batch.mentions)] = outputs[site].float()
    return {site.layer: values for site, values in collected.items()}


def reconstructions(x: Tensor, sae: str, layer: int) -> Tensor:
    """Return the reconstruction of a layer's activations by a bundled SAE, named by its folder: float32 [rows, d]."""
    loaded = open_sae(str(MODEL.parent / sae)).load(layer, "cpu")
    with torch.inference_mode():
        return torch.cat([loaded.decode(loaded.encode(part), part) for part in x.split(4096)]).float()
