"""The choice of C for each fold by out-of-fold losses, while the probes are fitted from the smallest C upwards.

    path = CPath(plan, device)
    fits = backend.fit(problem, path)     # ends a target's path where larger C can only be worse
    path.choice, path.scores              # int64 [targets, repeats, folds]; float32 [targets, repeats, rows]

Fits at the largest C take most of the time and are hardly ever chosen: along C the loss falls, and then rises as the
probe overfits. `RISE` is so large that noise in the losses seldom ends a path: of the choices in hard simulated worlds,
fewer than 1 in 1000 differ from those among all C (`pytest -m slow tests/test_c_path.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.system.out_of_memory import MemoryBudget

RISE = 0.05
"""A target's path ends once the loss of every fold exceeds its least value so far by this, in nats per row."""
_BUDGET = MemoryBudget("targets are scored")


class CPath:
    """Held-out scores and losses along C; keeps the scores at the least loss."""

    def __init__(self, plan: FoldPlan, device: torch.device) -> None:
        self._plan = plan
        self._held_out = torch.from_numpy(plan.held_out).to(device)
        self._folds = torch.from_numpy(plan.folds.astype(np.int64)).to(device)
        shape = len(plan.labels), plan.n_repeats
        self.choice = torch.zeros(*shape, plan.n_folds, dtype=torch.int64, device=device)  # index of C
        self.scores = torch.zeros(*shape, len(plan.groups), dtype=torch.float32, device=device)
        self._least = torch.zeros(self.choice.shape, dtype=torch.float64, device=device)
        self.begin(slice(0, 0))

    def begin(self, targets: slice) -> None:
        """Begin, or begin again, the paths of some targets."""
        self._targets, self._step = targets, 0
        n = len(self._plan.labels[targets])
        self._is_open = torch.ones(n, dtype=torch.bool, device=self.scores.device)
        self._current = torch.zeros(n, *self.scores.shape[1:], dtype=torch.float64, device=self.scores.device)

    def record(self, index: Tensor, margins: Tensor) -> None:
        """Record the margins `[columns, rows]` at the current C of regressions with this `index`, int64 `[columns]`.

        The index is target * splits + split. Each column counts where its split holds rows out.
        """
        target, split = index // len(self._held_out), index % len(self._held_out)
        place = (target - self._targets.start) * self._plan.n_repeats + split // self._plan.n_folds
        held_out = torch.where(self._held_out[split], margins, 0)
        self._current.flatten(0, 1).index_add_(0, place, held_out)

    def advance(self) -> Tensor:
        """Take the scores recorded at the current C into account; return which paths have not ended: bool [targets]."""
        first = self._targets.start

        def choose(part: slice) -> None:
            there = slice(first + part.start, first + part.stop)
            losses = out_of_fold_losses(self._plan, self._current[None, part], there)[0]
            is_open = self._is_open[part, None, None]
            better = is_open & (losses < self._least[there]) if self._step else is_open.expand_as(losses)
            self._least[there] = torch.where(better, losses, self._least[there])
            self.choice[there] = torch.where(better, self._step, self.choice[there])
            by_row = better.gather(2, self._folds.expand(len(losses), -1, -1))
            self.scores[there] = torch.where(by_row, self._current[part].float(), self.scores[there])
            self._is_open[part] &= ~(losses > self._least[there] + RISE).flatten(1).all(dim=1)

        _BUDGET.run_in_pieces(len(self._is_open), self._folds.numel(), choose)
        self._current.zero_()
        self._step += 1
        return self._is_open

    def chosen(self, i: int) -> Tensor:
        """Return the index of each column, among the targets begun last, for which the i-th C is chosen."""
        first = self._targets.start * len(self._held_out)
        return (self.choice[self._targets].flatten() == i).nonzero()[:, 0] + first

    def finish(self, index: Tensor, margins: Tensor) -> None:
        """Put the margins `[columns, rows]` at the chosen C in place of those recorded; `index` is as in `record`."""
        target, split = index // len(self._held_out), index % len(self._held_out)
        column, row = self._held_out[split].nonzero(as_tuple=True)
        self.scores[target[column], split[column] // self._plan.n_folds, row] = margins[column, row].float()


def out_of_fold_losses(plan: FoldPlan, scores: Tensor, targets: slice = slice(None)) -> Tensor:
    """Return the class-balanced log loss by which C is chosen for each fold: float64 [cs, targets, repeats, folds].

    It is the mean over the out-of-fold scores `[cs, targets, repeats, rows]` of the other folds, in nats; the fold's
    own rows are not used. `targets` are those of the plan that the scores are of.
    """
    labels = torch.from_numpy(plan.labels[targets]).to(scores.device)
    weights = torch.from_numpy(plan.weights).to(scores.device)
    member = torch.from_numpy(plan.held_out).to(scores.device).double().unflatten(0, (plan.n_repeats, plan.n_folds))
    loss = softplus(torch.where(labels[:, None], -scores, scores))
    mean = torch.zeros(1, dtype=torch.float64, device=scores.device)
    for label in (False, True):
        weight = weights * (labels == label)  # [targets, rows]
        summed = torch.einsum("ctri,ti,rki->ctrk", loss, weight, member)
        count = torch.einsum("ti,rki->trk", weight, member)
        mean = mean + (summed.sum(-1, keepdim=True) - summed) / (count.sum(-1, keepdim=True) - count) / 2
    return mean
