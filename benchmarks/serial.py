"""Compute the same measurement in the most direct way: one layer, one task, one batch and one fit at a time.

    timed(model_folder, sae_weights, layer=5, texts=texts, labels=labels, persons=persons).probe_seconds

Rows are used as shipped, in their order, with 32 texts per batch; the whole model with its LM head; dense codes;
scikit-learn's `LogisticRegression` for every view, fold and C. The definitions are those of the program
(docs/numbers.md). `benchmarks/bench_end_to_end.py` compares with it. It shares only the SAE's weights with the program.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 32
CS = tuple(10.0**k for k in range(-5, 2))


@dataclass(frozen=True)
class Serial:
    """Results and cost of one layer and task."""

    model_sel: float
    sae_sel: float
    forward_seconds: float  # model and SAE
    probe_seconds: float  # both views, one repeat


@torch.inference_mode()
def last_tokens(folder: Path, texts: Sequence[str], layer: int) -> Tensor:
    """Return the layer's output at each text's last token, float32 [texts, d]; texts are truncated from the left."""
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left", padding_side="right")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept: dict[str, Tensor] = {}
    model.gpt_neox.layers[layer].register_forward_hook(
        lambda _module, _args, out: kept.update(x=out if isinstance(out, Tensor) else out[0])
    )
    outputs = []
    for begin in range(0, len(texts), BATCH):
        batch = [tokenizer.bos_token + text for text in texts[begin : begin + BATCH]]
        longest = model.config.max_position_embeddings
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        model(**tokens)
        outputs.append(kept["x"][torch.arange(len(batch)), tokens["attention_mask"].sum(dim=1) - 1])
    return torch.cat(outputs)


@torch.inference_mode()
def reconstructions(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int, x: Tensor) -> Tensor:
    """Reconstruct with a TopK SAE, with codes as wide as the dictionary; weights [d_sae, d]."""
    values, latents = (x @ W_enc.T + b_enc).relu().topk(k)
    return torch.zeros(len(x), len(W_enc)).scatter(1, latents, values) @ W_dec + b_dec


def selectivity(
    x: NDArray[np.float32],
    fitted_on: NDArray[np.float32],
    labels: NDArray[np.bool_],
    persons: NDArray[np.int64],
    folds: NDArray[np.integer] | None = None,
) -> float:
    """Return the balanced accuracy of held-out predictions; C is chosen by the loss on the other folds.

    x is scaled with the statistics of the training folds. folds: the fold of each row; None: scikit-learn's.
    """
    if folds is None:
        splits = list(StratifiedGroupKFold(5, shuffle=True, random_state=0).split(x, labels, persons))
    else:
        splits = [(np.flatnonzero(folds != f), np.flatnonzero(folds == f)) for f in np.unique(folds)]
    scores = np.zeros((len(CS), len(labels)))
    losses = np.zeros((len(CS), len(splits)))
    for f, (train, test) in enumerate(splits):
        scale = x[train].std(axis=0) + 1e-12
        for c, C in enumerate(CS):
            probe = LogisticRegression(C=C, class_weight="balanced", max_iter=1000)
            probe.fit(fitted_on[train] / scale, labels[train])
            scores[c, test] = probe.decision_function(fitted_on[test] / scale)
            losses[c, f] = log_loss(labels[test], 1 / (1 + np.exp(-scores[c, test])))
    chosen = np.empty(len(labels))
    for f, (_, test) in enumerate(splits):
        chosen[test] = scores[np.delete(losses, f, axis=1).sum(axis=1).argmin(), test]
    return float(balanced_accuracy_score(labels, chosen > 0))


def timed(
    folder: Path,
    weights: tuple[Tensor, Tensor, Tensor, Tensor, int],
    layer: int,
    texts: Sequence[str],
    labels: NDArray[np.bool_],
    persons: NDArray[np.int64],
    clock: Callable[[], float] = time.perf_counter,
) -> Serial:
    """Measure one layer and task with one repeat. weights: the layer's SAE, as `reconstructions` takes them."""
    start = clock()
    x = last_tokens(folder, texts, layer)
    recon = reconstructions(*weights, x)
    forward = clock() - start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1000 iterations, a common limit
        model_sel, sae_sel = (selectivity(x.numpy(), view.numpy(), labels, persons) for view in (x, recon))
    return Serial(model_sel, sae_sel, forward, clock() - start - forward)
