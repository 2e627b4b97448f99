"""Sample activations of a few hundred texts before a run.

    mentions = draw_mentions(all_mentions, seed)                # 256 texts
    tokenised = tokenise(mentions, tokenizer, ...)
    drawn = draw_tokens(tokenised, seed)
    samples = calibrate(model, tokenised, "last", drawn)        # site -> SiteSample
    mean, axes = principal_axes(samples[site].counted(False))

The sample does not depend on the batch size, the results on disk or the layers still missing. So baselines made from
it have the same numbers in a resumed run as in an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from delta_selectivity.models.language_model import ActivationSource, Site
from delta_selectivity.tasks import Mention, TokenBatch, TokenisedMentions, batches

N_TEXTS = 256
N_TOKENS = 4096
"""Tokens sampled at each site, so that all sites of a large model fit in memory. The error of the mean then adds 1/4096
to the FVU of mean ablation."""
BATCH_TOKENS = 4096  # padded tokens in a forward pass, independent of `batch_size`


@dataclass(frozen=True)
class SiteSample:
    """Activations of the calibration texts at one site, float32 on the CPU."""

    x: Tensor  # [tokens, d], of the drawn tokens
    bos: Tensor  # bool [tokens], which of them are BOS
    probed: Tensor  # [probed, d], every probed token of these texts

    def counted(self, counts_bos: bool) -> Tensor:
        """Return x of the tokens that count in whole-text figures, with BOS only if `counts_bos`."""
        return self.x if counts_bos else self.x[~self.bos]


def draw_mentions(mentions: Sequence[Mention], seed: int) -> list[Mention]:
    """Draw `N_TEXTS` mentions by seed, in their given order; all if there are fewer."""
    chosen = np.random.default_rng(seed).permutation(len(mentions))[:N_TEXTS]
    return [mentions[i] for i in np.sort(chosen)]


def fingerprint(mentions: Sequence[Mention]) -> str:
    """Return a SHA-256 (64 hex digits) of the texts and constants that determine the sample."""
    digest = hashlib.sha256(json.dumps([N_TOKENS, BATCH_TOKENS]).encode())
    for mention in mentions:
        digest.update(json.dumps(mention.identity).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Tokens:
    """Tokens of texts."""

    text: npt.NDArray[np.int64]  # [tokens], index of the text
    place: npt.NDArray[np.int64]  # [tokens], index in the text's ids


def draw_tokens(tokenised: TokenisedMentions, seed: int, n_tokens: int = N_TOKENS) -> Tokens:
    """Draw at most `n_tokens` of all tokens, BOS included."""
    length = np.array([len(ids) for ids in tokenised.ids])
    start = np.cumsum(length) - length
    chosen = np.sort(np.random.default_rng([seed, len(length)]).permutation(length.sum())[:n_tokens])
    text = np.searchsorted(start, chosen, side="right") - 1
    return Tokens(text, chosen - start[text])


def calibrate(
    model: ActivationSource, tokenised: TokenisedMentions, positions: str, drawn: Tokens
) -> dict[Site, SiteSample]:
    """Return a sample of every site with a hook: the same tokens at each.

    positions: last, mean or all, as for the probes.

    Raises ArithmeticError, naming the layer, if an activation is NaN or Inf.
    """
    probed = _probed_tokens(tokenised, positions)
    wanted = Tokens(np.concatenate([drawn.text, probed.text]), np.concatenate([drawn.place, probed.place]))
    rows = _activations(model, tokenised, wanted)
    bos = torch.from_numpy((drawn.place == 0) & tokenised.has_bos)
    n = len(drawn.text)
    return {site: SiteSample(x[:n], bos, x[n:]) for site, x in rows.items()}


def principal_axes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean `[d]` and the orthonormal axes `[d, d]` of x `[rows, d]`, largest variance first; float64."""
    mean = x.double().mean(dim=0)
    centred = x.double() - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return mean, vectors.T.flip(0)


def _probed_tokens(tokenised: TokenisedMentions, positions: str) -> Tokens:
    """Return the name's tokens, or only its last."""
    first = tokenised.last if positions == "last" else tokenised.first
    spans = [np.arange(a, b + 1) for a, b in zip(first, tokenised.last, strict=True)]
    text = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
    return Tokens(text, np.concatenate(spans))


def _activations(model: ActivationSource, tokenised: TokenisedMentions, wanted: Tokens) -> dict[Site, Tensor]:
    """Return site -> float32 `[tokens, d]` on the CPU."""
    rows: dict[Site, Tensor] = {}
    for batch, in_batch, chosen, place in _by_batch(tokenised, wanted):
        for site, found in model.token_rows(batch.ids, batch.lengths, in_batch).items():
            x = found.index_select(0, place.to(found.device)).float().cpu()
            if not bool(torch.isfinite(x).all()):
                raise ArithmeticError(f"layer {site.layer}: NaN or Inf in the model's activations")
            rows.setdefault(site, x.new_empty(len(wanted.text), x.shape[1]))[chosen] = x
    return rows


def _by_batch(tokenised: TokenisedMentions, wanted: Tokens) -> Iterator[tuple[TokenBatch, Tensor, Tensor, Tensor]]:
    """Yield batches with their wanted tokens: bool [texts, tokens], and the indices of each among all and in the batch.

    A token that is wanted twice is in the batch once.
    """
    n = len(tokenised.ids)
    for batch in batches(tokenised, np.arange(n), batch_size=n, max_tokens=BATCH_TOKENS):
        row = np.full(n, -1)
        row[batch.mentions] = np.arange(len(batch.mentions))
        chosen = np.flatnonzero(row[wanted.text] >= 0)
        text, token = row[wanted.text[chosen]], wanted.place[chosen]
        in_batch = np.zeros(tuple(batch.ids.shape), dtype=bool)
        in_batch[text, token] = True
        place = (np.cumsum(in_batch) - 1).reshape(in_batch.shape)[text, token]
        yield batch, torch.from_numpy(in_batch), torch.from_numpy(chosen), torch.from_numpy(place)
