"""Dense features for the batched solver: all columns share one matrix, so an iteration is two large GEMMs.

Held-out rows have weight 0, so the matrix is the same for all columns. It is stored once, in float32, centred and
scaled. Float64 products use a float64 copy of x if x is small; a large x is converted a block of rows at a time.

The preconditioner is the inverse Hessian at zero (the bound of Böhning 1992), averaged over the columns and scaled to
their mean curvature. Tried without gain: a new Hessian for each C, or one per split, saved a tenth of the iterations
and took as long or longer; one eigendecomposition for all C with each column's own curvature saved no iterations. On
rows that are nearly separable, the curvature of most of them vanishes, and hundreds of iterations are not enough; there
each column gets its own inverse Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from delta_selectivity.probing.backends.history import dot
from delta_selectivity.probing.backends.lbfgs import KernelInput, Loss, QuadraticLoss
from delta_selectivity.probing.backends.problem import ProbeProblem
from delta_selectivity.system.gemm import linear

_TEMPORARIES = 12  # float64 matrices [columns, rows] alive at once
_BLOCK_ON_CPU, _BLOCK = 2**18, 2**24  # cells of x converted at a time: to fit a CPU cache; for few GPU launches
_GRAM_BLOCKS = 4  # factor of the block size: products of narrow panels are faster with more rows
_PANEL = 128  # columns of the Gram matrix computed at a time, from the diagonal down, since it is symmetric
_FEATURES_PER_COLUMN = 32  # with more features per column, solving takes less time than inverting and multiplying
_MAX_KERNEL_CELLS = 2**21  # cells of x up to which the compiled loop is faster: with more, products dominate
_MIN_FLOAT32_CELLS = 2**17  # cells of x from which float32 is faster: with fewer, call overhead dominates


@dataclass(frozen=True)
class DenseDesign:
    """The features of a problem."""

    x: Tensor  # float32 [rows, d], as given
    z: Tensor  # float32 [rows, d + 1], (x - centre) / unit; the last column is 1
    unit: Tensor  # float64 [d], between the splits' scales
    centre: Tensor  # float64 [d]
    divisor: Tensor  # float64 [splits, d]
    block: Tensor  # float64 [rows of a block, d], scratch for converting blocks, which is slower in new memory
    exact: Tensor | None  # float64 [rows, d + 1], x - centre and a column of ones; None if x is larger than a block

    @classmethod
    def build(cls, problem: ProbeProblem) -> DenseDesign:
        """Return a float32 copy of the problem's x, on its device."""
        x = problem.x
        divisor = problem.divisor.to(x.device)
        unit = divisor.log().mean(dim=0).exp()
        centre = _mean(x)
        z = torch.ones(len(x), x.shape[1] + 1, dtype=torch.float32, device=x.device)
        centre32 = centre.float()  # x - centre32 is exact where rounding matters
        inverse_unit = unit.reciprocal().float()
        shift = ((centre32 - centre) / unit).float()
        for rows in _blocks(x):
            torch.addcmul(shift, x[rows] - centre32, inverse_unit, out=z[rows, :-1])
        longest = max((len(x[rows]) for rows in _blocks(x)), default=0)
        if longest < len(x):
            return cls(x, z, unit, centre, divisor, centre.new_empty(longest, x.shape[1]), None)
        exact = torch.ones_like(z, dtype=torch.float64)
        exact[:, :-1] = x - centre
        return cls(x, z, unit, centre, divisor, centre.new_empty(0, x.shape[1]), exact)

    @property
    def column_bytes(self) -> int:
        """Return the size of a column's temporaries."""
        return 8 * _TEMPORARIES * max(len(self.z), 1)

    @property
    def max_own(self) -> int:
        """Return the number of columns whose own Hessians, in each of three copies, fit into 64 MB."""
        return 2**24 // self.z.shape[1] ** 2

    def start(self, n_columns: int) -> Tensor:
        """Return the initial theta [columns, d + 1] for the smallest C: zeros."""
        return torch.zeros(n_columns, self.z.shape[1], dtype=torch.float64, device=self.z.device)

    def columns(self, index: Tensor, split: Tensor, loss: Loss) -> DenseColumns:
        """Return regressions with these indices, splits (both int64 [columns]) and losses."""
        penalty = torch.ones(self.z.shape[1], dtype=torch.float64, device=self.z.device)
        penalty[-1] = 0
        products: Products
        if self.exact is None:
            products = BlockwiseProducts(self.x, self.centre, self.divisor[split], self.block)
        else:
            products = CentredProducts(self.exact, _with_intercept(self.divisor[split].reciprocal()))
        return DenseColumns(index, split, loss, products, penalty, self)

    def preconditioners(self, n_columns: int) -> InverseHessians:
        """Return the preconditioners for each C."""
        return InverseHessians(self.z, inverted=_FEATURES_PER_COLUMN * n_columns >= self.z.shape[1])


class Products(Protocol):
    """Products of the features with coefficients and with residuals; each column uses the scale of its split."""

    def forward(self, theta: Tensor) -> Tensor:
        """Return the margins [columns, rows] of theta [columns, d + 1]."""
        ...

    def backward(self, residual: Tensor) -> Tensor:
        """Return the products [columns, d + 1] with the residual [columns, rows]."""
        ...

    def select(self, chosen: Tensor) -> Products:
        """Return the columns at int64 `chosen`."""
        ...


@dataclass(frozen=True)
class BlockwiseProducts:
    """Products in float64, a block of x at a time. They centre x, so that a constant feature is exactly zero."""

    x: Tensor  # [rows, d]
    centre: Tensor  # [d]
    divisor: Tensor  # [columns, d]
    block: Tensor  # [rows of a block, d], scratch

    def forward(self, theta: Tensor) -> Tensor:
        coef = theta[:, :-1] / self.divisor
        margins = theta.new_empty(len(theta), len(self.x))
        for rows in _blocks(self.x):
            margins[:, rows] = coef @ self._centred(rows).T
        return margins.add_(theta[:, -1:])

    def backward(self, residual: Tensor) -> Tensor:
        total = residual.new_zeros(len(residual), self.x.shape[1])
        for rows in _blocks(self.x):
            total.addmm_(residual[:, rows], self._centred(rows))
        return torch.cat([total.div_(self.divisor), residual.sum(dim=1, keepdim=True)], dim=1)

    def select(self, chosen: Tensor) -> BlockwiseProducts:
        return BlockwiseProducts(self.x, self.centre, self.divisor[chosen], self.block)

    def _centred(self, rows: slice) -> Tensor:
        part = self.x[rows]
        return self.block[: len(part)].copy_(part).sub_(self.centre)


@dataclass(frozen=True)
class CentredProducts:
    """Products with a stored, centred matrix, in the precision of that matrix."""

    z: Tensor  # [rows, d + 1], the last column is 1
    stretch: Tensor  # [columns, d + 1]; a column's features are z times this

    def forward(self, theta: Tensor) -> Tensor:
        return linear(theta * self.stretch, self.z)

    def backward(self, residual: Tensor) -> Tensor:
        return linear(residual, self.z.T).mul_(self.stretch)

    def select(self, chosen: Tensor) -> CentredProducts:
        return CentredProducts(self.z, self.stretch[chosen])


@dataclass(frozen=True)
class ExpansionPoint:
    """The point around which the loss is quadratic, and the gradient there."""

    theta: Tensor  # [columns, d + 1]
    gradient: Tensor  # [columns, d + 1]

    def select(self, chosen: Tensor) -> ExpansionPoint:
        return ExpansionPoint(self.theta[chosen], self.gradient[chosen])


@dataclass(frozen=True)
class DenseColumns:
    """Logistic regressions on dense features; theta [columns, d + 1] has the intercept last."""

    index: Tensor  # int64 [columns]
    split: Tensor  # int64 [columns]
    loss: Loss | QuadraticLoss
    products: Products
    penalty: Tensor  # [d + 1], 1; 0 for the intercept
    design: DenseDesign
    origin: ExpansionPoint | None = None  # if the loss is a quadratic model

    def scaled(self, c: float) -> DenseColumns:
        assert isinstance(self.loss, Loss), "a quadratic model is for one C"
        return replace(self, loss=self.loss.scaled(c))

    def in_float32(self) -> DenseColumns | None:
        if self.design.x.numel() < _MIN_FLOAT32_CELLS:
            return None
        assert isinstance(self.loss, Loss), "a quadratic model is in float32 already"
        stretch = _with_intercept(self.design.unit / self.design.divisor[self.split])
        products = CentredProducts(self.design.z, stretch.float())
        return DenseColumns(self.index, self.split, self.loss.in_float32(), products, self.penalty.float(), self.design)

    def quadratic_at(self, theta: Tensor, margins: Tensor, gradient: Tensor) -> DenseColumns:
        loss = QuadraticLoss(self.loss.curvature(margins.to(theta.dtype)))
        return replace(self, loss=loss, origin=ExpansionPoint(theta, gradient))

    def select(self, chosen: Tensor) -> DenseColumns:
        parts = self.index[chosen], self.split[chosen], self.loss.select(chosen), self.products.select(chosen)
        origin = None if self.origin is None else self.origin.select(chosen)
        return DenseColumns(*parts, self.penalty, self.design, origin)

    def margins(self, theta: Tensor) -> Tensor:
        return self.products.forward(theta)

    def gradients(self, theta: Tensor, residual: Tensor, preconditioner: InverseHessian) -> tuple[Tensor, Tensor]:
        gradient = self.products.backward(residual)
        if self.origin is None:
            gradient += theta * self.penalty
        else:
            gradient += (theta - self.origin.theta) * self.penalty + self.origin.gradient
        return gradient, preconditioner.multiply(gradient.float()).to(gradient.dtype)

    def line_terms(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        return self.margins(direction), dot(self.penalty * direction, direction)

    def norms(self, theta: Tensor, margins: Tensor, gradient: Tensor, newton: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.vector_norm(newton, dim=1), torch.linalg.vector_norm(theta[:, :-1], dim=1)

    def own_preconditioner(self, margins: Tensor) -> InverseHessian:
        z = self.design.z
        stretch = _with_intercept(self.design.unit / self.design.divisor[self.split]).float()
        curvature = self.loss.curvature(margins).float()
        hessians = torch.stack([linear(z.T * weight, z.T) for weight in curvature])
        hessians *= stretch[:, :, None] * stretch[:, None, :]
        factors = _factored(hessians)
        return InverseHessian(factors, torch.cholesky_inverse(factors))

    def for_kernel(self, preconditioner: InverseHessian) -> KernelInput | None:
        products, inverse = self.products, preconditioner.inverse
        if inverse is None or inverse.device.type != "cpu":
            return None
        if not isinstance(products, CentredProducts) or products.z.numel() > _MAX_KERNEL_CELLS:
            return None
        logistic, empty = isinstance(self.loss, Loss), products.stretch[:0]
        loss = (
            (self.loss.weight, self.loss.positive_weight)
            if isinstance(self.loss, Loss)
            else (self.loss.second_derivative, self.loss.second_derivative)
        )
        origin = (empty, empty) if self.origin is None else (self.origin.theta, self.origin.gradient)
        groups = ((products.z, products.stretch, inverse if inverse.dim() == 3 else inverse[None]), loss, origin)
        features, loss_arrays, origin_arrays = (tuple(t.contiguous().numpy() for t in group) for group in groups)
        return KernelInput(features, loss_arrays, logistic, origin_arrays)

    def coefficients(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        coef = theta[:, :-1] / self.design.divisor[self.split]
        return coef, theta[:, -1] - coef @ self.design.centre


@dataclass(frozen=True)
class InverseHessian:
    """The inverse Hessian of the objective: of all columns for stretch 1, or of each."""

    factor: Tensor  # float32 [d + 1, d + 1] or [columns, d + 1, d + 1], the Hessian's lower Cholesky factor
    inverse: Tensor | None  # float32, of the same shape; None: solving for few columns takes less time

    def multiply(self, v: Tensor) -> Tensor:
        """Multiply by v [columns, d + 1]."""
        if self.inverse is not None and self.inverse.dim() == 3:
            return torch.bmm(self.inverse, v[:, :, None])[:, :, 0]
        if self.inverse is not None:
            return linear(v, self.inverse.T)
        half = torch.linalg.solve_triangular(self.factor, v.T, upper=False)  # `cholesky_solve` copies the factor
        return torch.linalg.solve_triangular(self.factor.T, half, upper=True).T

    def select(self, chosen: Tensor) -> InverseHessian:
        """Return that of the columns at int64 `chosen`."""
        if self.inverse is None or self.inverse.dim() == 2:
            return self
        return InverseHessian(self.factor[chosen], self.inverse[chosen])


class InverseHessians:
    """Inverse Hessians for a sequence of C."""

    def __init__(self, z: Tensor, inverted: bool) -> None:
        self._z, self._inverted = z, inverted
        self._gram: Tensor | None = None  # z' S z for the first curvature S, and the sum of that
        self._sum = torch.ones(())

    def at(self, c: float, curvature: Tensor) -> InverseHessian:
        """Return the inverse Hessian for C = c; `curvature` [rows] is the mean over columns for C = 1."""
        if self._gram is None:
            self._gram, self._sum = self._weighted_gram(curvature.float()), curvature.sum()
        factor = _factored(self._gram * (c * curvature.sum() / self._sum).float())
        return InverseHessian(factor, torch.cholesky_inverse(factor) if self._inverted else None)

    def _weighted_gram(self, curvature: Tensor) -> Tensor:
        """Return z' diag(curvature) z: the lower triangle and some entries above it."""
        gram = self._z.new_zeros(self._z.shape[1], self._z.shape[1])
        for rows in _blocks(self._z, _GRAM_BLOCKS):
            part = self._z[rows].T.contiguous()
            weighted = part * curvature[rows]
            for start in range(0, len(gram), _PANEL):
                panel = slice(start, start + _PANEL)
                gram[start:, panel] += linear(part[start:], weighted[panel])
        return gram


def _factored(loss: Tensor) -> Tensor:
    """Return the lower Cholesky factors of Hessians, given the loss's part, float32 [..., d + 1, d + 1]; changes it.

    Rounding is added to each feature in proportion to its own curvature, as it arises: in proportion to the mean, it
    would outweigh all ordinary features where one is many orders larger than they are.
    """
    diagonal = loss.diagonal(dim1=-2, dim2=-1)  # a view
    diagonal[..., :-1] += 1  # the penalty
    rounding = 4 * torch.finfo(torch.float32).eps * loss.shape[-1] ** 0.5 * diagonal.clamp(min=1)  # the intercept's: 0
    while True:
        diagonal += rounding
        factor, failed = torch.linalg.cholesky_ex(loss)
        if not bool(failed.any()):
            return factor
        if not bool(loss.isfinite().all()):  # no added rounding helps
            raise ArithmeticError("too large for probes: their squares, in units of x's deviation, overflow float32")
        rounding *= 10


def _with_intercept(scale: Tensor) -> Tensor:
    """Append the scale of the intercept, 1, to each column."""
    return torch.cat([scale, torch.ones_like(scale[:, :1])], dim=1)


def _mean(x: Tensor) -> Tensor:
    """Return the mean over the rows in float64, without a float64 copy of x: [d]."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for rows in _blocks(x):
        total += x[rows].sum(dim=0, dtype=torch.float64)
    return total / len(x)


def _blocks(x: Tensor, factor: int = 1) -> Iterator[slice]:
    """Return slices that cover the rows of x; on a CPU, `factor` multiplies their size."""
    cells = factor * _BLOCK_ON_CPU if x.device.type == "cpu" else _BLOCK
    size = max(1, cells // max(x.shape[1], 1))
    return (slice(start, start + size) for start in range(0, len(x), size))
