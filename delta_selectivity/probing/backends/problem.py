"""Input and output types of a probe backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProbeProblem:
    """Many weighted L2 logistic regressions on the same rows: one for each C, target and split.

    For every (C, target, split), find the minimum over w `[d]` and b of

        1/2 |w|^2 + C sum_i v_i log(1 + exp(-y_i f_i)),    f_i = (x_i / scale_split) . w + b,    y_i = +-1

    where v is `weight` with each class scaled to half of the split's total, as in scikit-learn's
    ``class_weight="balanced"``. The intercept is not penalised, so centring x does not change the fit.

    Raises ValueError for shapes that do not fit, NaN or Inf in x, a negative weight, or C out of order.
    """

    x: Tensor  # float32 [rows, d], raw features on any device; dense, or sparse CSR (duplicate entries are added)
    labels: Tensor  # bool [targets, rows]
    weight: Tensor  # float [splits, rows], the row's weight; 0: held out by that split
    scale: Tensor  # float [splits, d], divisor of the features; 0 (a constant feature) counts as 1
    cs: tuple[float, ...]  # inverse strengths of regularisation, positive, ascending

    def __post_init__(self) -> None:
        rows, d = self.x.shape
        splits = self.weight.shape[0]
        shapes = (self.labels.shape[1:], self.weight.shape[1:], self.scale.shape)
        if shapes != ((rows,), (rows,), (splits, d)):
            raise ValueError(
                f"x {tuple(self.x.shape)} does not fit labels {tuple(self.labels.shape)}, "
                f"weight {tuple(self.weight.shape)} and scale {tuple(self.scale.shape)}"
            )
        if not bool(torch.isfinite(self.x.values() if self.x.is_sparse_csr else self.x).all()):
            raise ValueError("x has NaN or Inf")
        if not bool((self.weight >= 0).all()):
            raise ValueError("a weight is negative or NaN")
        if not self.cs or self.cs[0] <= 0 or any(a >= b for a, b in zip(self.cs, self.cs[1:], strict=False)):
            raise ValueError(f"C must be positive and ascending, not {self.cs}")

    @property
    def n_targets(self) -> int:
        return self.labels.shape[0]

    @property
    def n_splits(self) -> int:
        return self.weight.shape[0]

    @property
    def divisor(self) -> Tensor:
        """float64 [splits, d]: `scale` with 1 in place of 0."""
        scale = self.scale.double()
        return torch.where(scale > 0, scale, torch.ones_like(scale))


@dataclass(frozen=True)
class ProbeFits:
    """The fitted probes: score = x . coef + intercept; a positive score predicts the label."""

    coef: Tensor  # float64 [cs, targets, splits, d], in units of the raw x
    intercept: Tensor  # float64 [cs, targets, splits]
    converged: Tensor  # bool [cs, targets, splits]
    n_iter: Tensor  # int64 [cs, targets, splits]
    fitted: Tensor  # bool [cs, targets]; the other arrays are 0 where not fitted, because the target's path had ended

    @classmethod
    def empty(cls, problem: ProbeProblem) -> ProbeFits:
        """Allocate the fits of `problem` on its device, filled with zeros."""
        shape, device = (len(problem.cs), problem.n_targets, problem.n_splits), problem.x.device
        return cls(
            coef=torch.zeros(*shape, problem.x.shape[1], dtype=torch.float64, device=device),
            intercept=torch.zeros(shape, dtype=torch.float64, device=device),
            converged=torch.zeros(shape, dtype=torch.bool, device=device),
            n_iter=torch.zeros(shape, dtype=torch.int64, device=device),
            fitted=torch.zeros(shape[:2], dtype=torch.bool, device=device),
        )


class Path(Protocol):
    """Follows fits from the smallest C upwards, ends, and chooses a C for each column (`c_path.CPath`).

    A column's index is target * splits + split. A backend may record fits that are good enough to choose by, then
    finish those that are chosen, and record them again.
    """

    def begin(self, targets: slice) -> None:
        """Begin, or begin again, the paths of some targets."""
        ...

    def record(self, index: Tensor, margins: Tensor) -> None:
        """Record the margins [columns, rows] of some columns at the current C; index: int64 [columns]."""
        ...

    def advance(self) -> Tensor:
        """Go on to the next C, once each column is recorded; return which targets need it: bool [targets]."""
        ...

    def chosen(self, i: int) -> Tensor:
        """Return the index of each column, among the targets begun last, for which the i-th C is chosen."""
        ...

    def finish(self, index: Tensor, margins: Tensor) -> None:
        """Record the margins [columns, rows] of some columns at the chosen C."""
        ...


class ProbeBackend(Protocol):
    """A solver of probe problems."""

    @property
    def name(self) -> str: ...

    def fit(self, problem: ProbeProblem, path: Path | None = None) -> ProbeFits:
        """Fit the probes of the problem at every C, or, with a path, up to the C at which it ends.

        With a path, only the fits that it chooses need be exact. `converged` is False for fits that did not converge.
        """
        ...


def balanced(labels: Tensor, weight: Tensor) -> Tensor:
    """Return the weights with each class of `labels` scaled to half of the total; the total is unchanged.

    labels (bool) and weight (float) broadcast against each other; the last axis is rows. The result is float64.
    Raises ValueError if a class has no weight.
    """
    weight = weight.double()
    total = weight.sum(-1, keepdim=True)
    positive = (weight * labels).sum(-1, keepdim=True)
    negative = (weight * ~labels).sum(-1, keepdim=True)
    if not bool(((positive > 0) & (negative > 0)).all()):
        raise ValueError("a class has no rows in a training split: a probe needs rows of both classes")
    return weight * torch.where(labels, total / (2 * positive), total / (2 * negative))
