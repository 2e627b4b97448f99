"""Sparse CSR features (SAE latents) for the batched solver, without a dense [rows, d] matrix.

The optimum lies in the span of the rows, w = X' a (the representer theorem), so each column is solved for its a
`[rows]` and intercept. A step takes four products with sparse matrices, and L-BFGS stores vectors as long as the number
of rows, which is much smaller than the number of latents. The gradient of the objective by a is K (a + r), where r is
the derivative of the loss by the margins and K = X X'.

The preconditioner is the inverse Hessian K^-1 - (S^-1 + K)^-1, where S is the mean curvature of the rows. It is applied
to K (a + r) as a + r - (S^-1 + K)^-1 K (a + r), so K is never inverted. Within the inverse, K is exact for the latents
that contribute most to it. The others are nearly orthogonal, since each fires on few rows; they are replaced by a
diagonal upper bound (Gershgorin), which keeps the preconditioner positive. The inverse uses Woodbury's identity.

Torch's CSR products took about 1.4 ms for 3000 rows of 32 latents and 25 columns on one core, a gather-sum by
`embedding_bag` 2.7 ms; SciPy took 1.5 ms and works on a CPU only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from delta_selectivity.probing.backends.lbfgs import Loss, dot
from delta_selectivity.probing.backends.problem import ProbeProblem

_LEADING = 1024  # latents that the preconditioner treats exactly
_TEMPORARIES = 60  # float64 vectors [rows] alive at once for a column, including L-BFGS's history
_BLOCK = 128  # columns of a Gram matrix computed at a time


@dataclass(frozen=True)
class SparseMatrix:
    """Float64 CSR matrix with a transposed copy, because torch has no products with CSC."""

    row: Tensor  # int64 [nnz], ascending
    col: Tensor  # int64 [nnz]
    value: Tensor  # float64 [nnz]
    shape: tuple[int, int]

    @cached_property
    def forward(self) -> Tensor:
        """The matrix, CSR."""
        return _csr(self.row, self.col, self.value, self.shape)

    @cached_property
    def transposed(self) -> Tensor:
        """Its transpose, CSR."""
        order = torch.argsort(self.col, stable=True)
        return _csr(self.col[order], self.row[order], self.value[order], (self.shape[1], self.shape[0]))

    def columns(self, chosen: Tensor) -> SparseMatrix:
        """Return the columns at these indices (int64 [n], distinct), in this order."""
        place = torch.full((self.shape[1],), -1, device=self.col.device)
        place[chosen] = torch.arange(len(chosen), device=self.col.device)
        kept = place[self.col] >= 0
        return SparseMatrix(self.row[kept], place[self.col[kept]], self.value[kept], (self.shape[0], len(chosen)))

    def energy(self) -> Tensor:
        """Return the sum of squares of each column, [columns]."""
        return self.value.new_zeros(self.shape[1]).index_add_(0, self.col, self.value.square())


@dataclass(frozen=True)
class SparseDesign:
    """The live features of a problem, scaled by the geometric mean of the splits' scales."""

    x: SparseMatrix  # [rows, live], sorted by energy, largest first
    live: Tensor  # int64 [live], their indices among the problem's d features
    d: int  # features of the problem
    unit: Tensor  # float64 [live]; x = raw x / unit
    gain: Tensor | None  # float64 [splits, live], (unit / scale)²; None: all ones

    @classmethod
    def build(cls, problem: ProbeProblem) -> SparseDesign:
        """Build the design: duplicate entries are added, empty columns are left out."""
        raw = _coalesced(problem.x)
        divisor = problem.divisor.to(problem.x.device)
        unit = divisor.log().mean(dim=0).exp()
        scaled = SparseMatrix(raw.row, raw.col, raw.value / unit[raw.col], raw.shape)
        energy = scaled.energy()
        live = energy.argsort(descending=True, stable=True)[: max(1, int((energy > 0).sum()))]
        divisor, unit = divisor[:, live], unit[live]
        gain = None if torch.equal(divisor, divisor[:1].expand_as(divisor)) else (unit / divisor).square()
        return cls(scaled.columns(live), live, raw.shape[1], unit, gain)

    @property
    def column_bytes(self) -> int:
        """Return the size of a column's temporaries."""
        rows, live = self.x.shape
        return 8 * (_TEMPORARIES * max(rows, 1) + 2 * live + self.d)

    def start(self, n_columns: int) -> Tensor:
        """Return the initial theta [columns, rows + 1] for the smallest C: zeros."""
        return self.x.value.new_zeros(self.x.shape[0] + 1, n_columns).T

    def columns(self, index: Tensor, split: Tensor, loss: Loss) -> SparseColumns:
        """Return regressions with these indices, splits (both int64 [columns]) and losses."""
        gain = None if self.gain is None else self.gain[split].T
        return SparseColumns(index, Loss(_column_major(loss.weight), _column_major(loss.positive_weight)), self, gain)

    max_own = 0  # columns that can each have a preconditioner of their own at a time

    def preconditioners(self, n_columns: int) -> SparsePreconditioners:
        """Return the preconditioners for each C."""
        return SparsePreconditioners(self)


@dataclass(frozen=True)
class SparseColumns:
    """Regressions in dual form: theta [columns, rows + 1] is a and then the intercept.

    Each [columns, n] tensor is stored column-major, as products with CSR need it.
    """

    index: Tensor  # int64 [columns]
    loss: Loss
    design: SparseDesign
    gain: Tensor | None  # [live, columns], corrects x to the scale of the column's split; None: all ones

    def scaled(self, c: float) -> SparseColumns:
        return replace(self, loss=self.loss.scaled(c))

    def in_float32(self) -> None:
        return None

    def select(self, chosen: Tensor) -> SparseColumns:
        loss = self.loss.select(chosen)
        gain = None if self.gain is None else self.gain[:, chosen]
        loss = Loss(_column_major(loss.weight), _column_major(loss.positive_weight))
        return SparseColumns(self.index[chosen], loss, self.design, gain)

    def margins(self, theta: Tensor) -> Tensor:
        return self._kernel(theta[:, :-1]) + theta[:, -1:]

    def gradients(self, theta: Tensor, residual: Tensor, preconditioner: Preconditioner) -> tuple[Tensor, Tensor]:
        rest = theta[:, :-1] + residual  # 0 at the optimum
        gradient = self._kernel(rest)
        slope = residual.sum(dim=1, keepdim=True)  # by the intercept
        solved = preconditioner.solve(gradient)
        shift = (slope - solved.sum(dim=1, keepdim=True)) / preconditioner.ones.sum()
        return _append_intercept(gradient, slope), _append_intercept(rest - solved - preconditioner.ones * shift, shift)

    def line_terms(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        kernel = self._kernel(direction[:, :-1])
        return kernel + direction[:, -1:], dot(direction[:, :-1], kernel)

    def own_preconditioner(self, margins: Tensor) -> Preconditioner:
        raise NotImplementedError("`SparseDesign.max_own` is 0")

    def for_kernel(self, preconditioner: object) -> None:
        """Return None: the compiled loop supports only dense features."""

    def norms(self, theta: Tensor, margins: Tensor, gradient: Tensor, newton: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step's norm by the Hessian, an upper bound of its own norm, and the coefficients' norm."""
        squares = dot(gradient, newton), dot(theta[:, :-1], margins - theta[:, -1:])
        step, coef = (square[:, 0].clamp(min=0).sqrt() for square in squares)
        return step, coef

    def coefficients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        w = self._primal(theta[:, :-1]).T / self.design.unit
        coef = w.new_zeros(len(w), self.design.d)
        coef[:, self.design.live] = w
        return coef, theta[:, -1]

    def _primal(self, a: Tensor) -> Tensor:
        """Return gain X' a, [live, columns]."""
        w = self.design.x.transposed @ _column_major(a).T
        return w if self.gain is None else w.mul_(self.gain)

    def _kernel(self, a: Tensor) -> Tensor:
        """Return K a, [columns, rows]."""
        return (self.design.x.forward @ self._primal(a)).T


@dataclass(frozen=True)
class Preconditioner:
    """(S^-1 + K)^-1 with K = F F' + diagonal: Woodbury's identity around `base` = (S^-1 + diagonal)^-1."""

    base: Tensor  # [rows]
    leading: SparseMatrix  # F, [rows, leading]
    inverse: Tensor  # (1 + F' base F)^-1, [leading, leading]

    def select(self, chosen: Tensor) -> Preconditioner:
        """Return it for some of the columns: the same, because all share it."""
        return self

    def solve(self, v: Tensor) -> Tensor:
        """Multiply by v [columns, rows]."""
        scaled = v.T * self.base[:, None]
        inner = self.inverse @ (self.leading.transposed @ scaled)
        return (scaled - (self.leading.forward @ inner) * self.base[:, None]).T

    @cached_property
    def ones(self) -> Tensor:
        """Multiply by ones, [1, rows]: the effect of a shift of the intercept on a."""
        return self.solve(torch.ones(1, len(self.base), dtype=self.base.dtype, device=self.base.device))


class SparsePreconditioners:
    """Preconditioners for a sequence of C."""

    def __init__(self, design: SparseDesign) -> None:
        n = design.x.shape[1]
        # the K of any column is at most the largest gain times K, so this bounds all splits
        gain = 1.0 if design.gain is None else float(design.gain.max().clamp(min=1)) ** 0.5
        x = SparseMatrix(design.x.row, design.x.col, design.x.value * gain, design.x.shape)
        indices = torch.arange(n, device=x.col.device)
        self._leading, rest = x.columns(indices[:_LEADING]), x.columns(indices[_LEADING:])
        column = rest.value.new_zeros(rest.shape[1]).index_add_(0, rest.col, rest.value.abs())
        bound = rest.value.abs() * column[rest.col]
        self._bound = x.value.new_zeros(x.shape[0]).index_add_(0, rest.row, bound)  # row sums of |rest| |rest|'

    def at(self, c: float, curvature: Tensor) -> Preconditioner:
        """Return the preconditioner for C = c; `curvature` [rows] is the mean over columns for C = 1."""
        s = c * curvature
        base = s / (1 + s * self._bound)
        n = self._leading.shape[1]
        eye = torch.eye(n, dtype=base.dtype, device=base.device)
        gram = eye.clone()
        for block in torch.arange(n, device=base.device).split(_BLOCK):
            seen = self._leading.forward @ eye[:, block]
            gram[:, block] += self._leading.transposed @ (seen * base[:, None])
        return Preconditioner(base, self._leading, torch.cholesky_inverse(torch.linalg.cholesky(gram)))


def _coalesced(x: Tensor) -> SparseMatrix:
    """Return the entries of a CSR tensor row by row, with duplicate entries of a cell added."""
    rows, d = x.shape
    row = torch.arange(rows, device=x.device).repeat_interleave(x.crow_indices().diff().long())
    cell, which = torch.unique(row * d + x.col_indices().long(), return_inverse=True)
    value = x.values().new_zeros(len(cell), dtype=torch.float64).index_add_(0, which, x.values().double())
    return SparseMatrix(cell // d, cell % d, value, (rows, d))


def _csr(row: Tensor, col: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    crow = F.pad(torch.bincount(row, minlength=shape[0]).cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(crow, col, value, shape, check_invariants=False)


def _column_major(v: Tensor) -> Tensor:
    """Return v [columns, n] in column-major layout."""
    return v.T.contiguous().T


def _append_intercept(a: Tensor, intercept: Tensor) -> Tensor:
    """Concatenate [columns, n] and [columns, 1], in column-major layout."""
    return torch.cat([a.T, intercept.T]).T
