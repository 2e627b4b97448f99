"""The batched solver of probes, on any device, for dense and sparse CSR features.

The columns (target x split) of a problem are solved together by preconditioned L-BFGS (`lbfgs`); along C each column
starts from its solution at the smaller C. The columns share features and preconditioner: a `Design`, which is
`torch_dense` or `torch_sparse`.

Float32 alone stalls above the tolerance for some C, so every fit of dense features is finished in float64 (`lbfgs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from delta_selectivity.probing.backends.lbfgs import (
    Columns,
    Limits,
    Loss,
    Optimum,
    Selectable,
    approach,
    finish,
    minimise,
)
from delta_selectivity.probing.backends.problem import Path, ProbeFits, ProbeProblem, balanced
from delta_selectivity.probing.backends.torch_dense import DenseDesign
from delta_selectivity.probing.backends.torch_sparse import SparseDesign
from delta_selectivity.system.out_of_memory import ERRORS, MemoryBudget, is_out_of_memory

SLOW = 125
"""Expected iterations from which on each column gets a preconditioner of its own; they grow as the root of C."""

_ROUGH = 1e-1  # tolerance before columns get their own preconditioners

P = TypeVar("P", bound=Selectable)
P_co = TypeVar("P_co", covariant=True)


class Preconditioners(Protocol[P_co]):
    """Preconditioners for a sequence of C."""

    def at(self, c: float, curvature: Tensor) -> P_co:
        """Return the preconditioner for C = c; `curvature` [rows] is the mean over columns for C = 1."""
        ...


class Design(Protocol[P]):
    """The features that all columns of a problem share."""

    @property
    def column_bytes(self) -> int:
        """Return the size of a column's temporaries."""
        ...

    @property
    def max_own(self) -> int:
        """Return how many columns can each have a preconditioner of their own at a time; 0: none can."""
        ...

    def start(self, n_columns: int) -> Tensor:
        """Return the initial theta [columns, p] for the smallest C: zeros."""
        ...

    def columns(self, index: Tensor, split: Tensor, loss: Loss) -> Columns[P]:
        """Return regressions with these indices, splits (both int64 [columns]) and losses."""
        ...

    def preconditioners(self, n_columns: int) -> Preconditioners[P]:
        """Return the preconditioners for each C, for this total number of columns."""
        ...


@dataclass(frozen=True)
class TorchLbfgs:
    """The batched solver. On a CPU, it is deterministic for a given machine and number of threads."""

    tolerance: float = 1e-6  # of the next (preconditioned) step, relative to the coefficients
    max_iter: int = 500  # for each C
    memory: int = 10  # pairs that L-BFGS stores
    max_bytes: int = 256 * 2**20  # memory for the temporaries of the columns that are solved side by side
    name: str = field(default="torch", init=False)
    _budget: MemoryBudget = field(
        default_factory=lambda: MemoryBudget("probes are fitted"), init=False, repr=False, compare=False
    )  # a unit is a column, a cell is a byte

    def fit(self, problem: ProbeProblem, path: Path | None = None) -> ProbeFits:
        """Fit the probes (see `ProbeBackend`); `converged` is False for columns that reached `max_iter`."""
        if problem.x.layout == torch.sparse_csr:
            return self._fit(problem, SparseDesign.build(problem), path)
        return self._fit(problem, DenseDesign.build(problem), path)

    def _fit(self, problem: ProbeProblem, design: Design[P], path: Path | None) -> ProbeFits:
        fits = ProbeFits.empty(problem)
        width = max(1, self.max_bytes // design.column_bytes)
        together = max(1, width // problem.n_splits)  # targets: all columns of one go along C side by side
        for first in range(0, problem.n_targets, together):
            targets = slice(first, min(first + together, problem.n_targets))
            self._within_memory(problem, design, targets, width, fits, path)
        return fits

    def _within_memory(
        self, problem: ProbeProblem, design: Design[P], targets: slice, width: int, fits: ProbeFits, path: Path | None
    ) -> None:
        """Solve the columns of these targets side by side, at most `width` at a time; fewer if memory runs out."""
        index = torch.arange(targets.start * problem.n_splits, targets.stop * problem.n_splits)
        while True:
            size = min(len(index), width, self._budget.max_units(design.column_bytes))
            try:
                self._fit_chunk(targets, _Parts(problem, design, index.split(size)), fits, path)
            except ERRORS as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
            else:
                self._budget.record_success(size)
                return
            self._budget.halve(size, design.column_bytes)

    def _fit_chunk(self, targets: slice, parts: _Parts[P], fits: ProbeFits, path: Path | None) -> None:
        """Solve the columns along C, and write them into `fits` in the units of x."""
        cs, fits.fitted[:, targets] = parts.problem.cs, False
        needed = torch.ones(targets.stop - targets.start, dtype=torch.bool, device=parts.device)
        preconditioners, size, near = parts.design.preconditioners(parts.n_columns), parts.size, {}
        has_own, mean_n_iter = False, 0.0
        if path is not None:
            path.begin(targets)
        for i, c in enumerate(cs):
            if i > 0:
                has_own |= mean_n_iter * (c / cs[i - 1]) ** 0.5 > SLOW
            curvature = parts.mean_curvature()
            shared, n_iter, rough = preconditioners.at(c, curvature), 0, []
            for columns, theta, margins in parts:
                given = columns.scaled(c), theta, margins, shared
                if has_own and parts.design.max_own:
                    best, is_exact = self._minimise_with_own(*given, parts.design.max_own), True
                elif path is None:
                    best, is_exact = minimise(*given, self._limits, self.memory), True
                else:
                    best, is_exact = approach(*given, self._limits, self.memory)
                parts.store(best.theta, best.margins)
                n_iter += int(best.n_iter.sum())
                _write(fits, i, columns, best)
                if not is_exact:
                    rough.append((columns.index, best.theta.float()))
                if path is not None:
                    path.record(columns.index, best.margins)
            if rough:
                near[i] = _Rough(curvature, *map(torch.cat, zip(*rough, strict=True)))
            fits.fitted[i, targets] = needed
            mean_n_iter = n_iter / parts.n_columns
            if path is not None:
                needed = path.advance().to(parts.device)
                parts.keep(needed, targets.start)
            if not parts.n_columns:
                break
        if path is not None:
            for i, found in near.items():  # preconditioners are computed again: all of them would take more memory
                some = found.select(path.chosen(i))
                if len(some.which):
                    chosen = _Parts(parts.problem, parts.design, some.which.cpu().split(size), some.theta.split(size))
                    self._finish(i, chosen, preconditioners.at(cs[i], some.curvature), fits, path)

    def _finish(self, i: int, parts: _Parts[P], shared: P, fits: ProbeFits, path: Path) -> None:
        """Finish columns for which the i-th C is chosen."""
        for columns, theta, margins in parts:
            done = (values[i].flatten()[columns.index] for values in (fits.converged, fits.n_iter))
            near = Optimum(theta, margins, *done)
            best = finish(columns.scaled(parts.problem.cs[i]), near, shared, self._limits, self.memory)
            _write(fits, i, columns, best)
            path.finish(columns.index, best.margins)

    @property
    def _limits(self) -> Limits:
        return Limits(self.tolerance, self.max_iter)

    def _minimise_with_own(
        self, columns: Columns[P], theta: Tensor, margins: Tensor, shared: P, max_own: int
    ) -> Optimum:
        """Minimise with the shared preconditioner roughly, then with each column's own inverse Hessian from there on.

        Near the optimum, the inverse Hessian also says how far it is. Columns that fail so, because rounding spoils the
        rough point, begin again with the shared preconditioner alone.
        """
        rough = Limits(max(_ROUGH, self.tolerance), self.max_iter // 2)
        near = minimise(columns, theta, margins, shared, rough, self.memory)
        usable = (near.theta.isfinite().all(dim=1) & near.margins.isfinite().all(dim=1))[:, None]
        near = replace(
            near, theta=torch.where(usable, near.theta, theta), margins=torch.where(usable, near.margins, margins)
        )
        best, last = near, Limits(self.tolerance, self.max_iter - self.max_iter // 2)
        for part in torch.arange(len(theta), device=theta.device).split(max_own):
            some, start = columns.select(part), near.select(part)
            own = some.own_preconditioner(start.margins)
            best = best.with_columns(part, minimise(some, start.theta, start.margins, own, last, self.memory))
        best = replace(best, n_iter=near.n_iter + best.n_iter)
        failed = (~best.converged).nonzero()[:, 0]
        if not len(failed):
            return best
        rest = columns.select(failed)
        found = minimise(rest, theta[failed], margins[failed], shared.select(failed), self._limits, self.memory)
        return best.with_columns(failed, found)


def _write(fits: ProbeFits, i: int, columns: Columns[P], best: Optimum) -> None:
    """Write the fits of these columns at the i-th C."""
    coef, intercept = columns.coefficients(best.theta)
    fits.coef[i].flatten(0, 1)[columns.index] = coef
    fits.intercept[i].flatten()[columns.index] = intercept
    fits.converged[i].flatten()[columns.index] = best.converged
    fits.n_iter[i].flatten()[columns.index] = best.n_iter


class _Rough(NamedTuple):
    """Solutions in float32 at one C."""

    curvature: Tensor  # [rows], the mean over columns for C = 1
    which: Tensor  # int64 [columns], their index
    theta: Tensor  # float32 [columns, p]

    def select(self, index: Tensor) -> _Rough:
        """Return those of these columns that are in `index`, in float64."""
        chosen = torch.isin(self.which, index)
        return _Rough(self.curvature, self.which[chosen], self.theta[chosen].double())


class _Parts(Generic[P]):
    """Columns that share a preconditioner, in parts that are solved one after the other.

    A single part keeps its margins from one C to the next. If there are several parts, only theta is kept and the rest
    is computed again, to save memory. Since all parts share the preconditioner, each column takes the same steps in
    both cases, up to rounding and the tolerance.
    """

    def __init__(
        self, problem: ProbeProblem, design: Design[P], parts: Sequence[Tensor], theta: Sequence[Tensor] | None = None
    ) -> None:
        """Begin at theta [columns, p] of each part; None: at zero. parts: int64 [columns], target * splits + split."""
        self.problem, self.design, self._parts = problem, design, [*parts]
        self.device, self.size = problem.x.device, len(parts[0])
        self._theta = [design.start(len(index)) for index in parts] if theta is None else [*theta]
        self._columns: Columns[P]
        self._prepare(0)

    @property
    def n_columns(self) -> int:
        """Number of columns that are still fitted."""
        return sum(map(len, self._parts))

    def __iter__(self) -> Iterator[tuple[Columns[P], Tensor, Tensor]]:
        """Yield each part's columns, theta [columns, p] and margins [columns, rows]."""
        for place, index in enumerate(self._parts):
            if not len(index):
                continue
            if place != self._place:
                del self._columns, self._margins
                self._prepare(place)
            yield self._columns, self._theta[place], self._margins

    def store(self, theta: Tensor, margins: Tensor) -> None:
        """Store the solution of the part that was yielded last."""
        self._theta[self._place], self._margins = theta, margins

    def keep(self, needed: Tensor, first: int) -> None:
        """Keep only the columns of some targets: bool [targets], from the target `first` on."""
        if bool(needed.all()):
            return
        kept = [needed[index.to(self.device) // self.problem.n_splits - first].nonzero()[:, 0] for index in self._parts]
        some = kept[self._place]
        self._columns, self._margins = self._columns.select(some), self._margins[some]
        self._parts = [index[some.cpu()] for index, some in zip(self._parts, kept, strict=True)]
        self._theta = [theta[some] for theta, some in zip(self._theta, kept, strict=True)]

    def mean_curvature(self) -> Tensor:
        """Return the loss's second derivative by the margins for C = 1, averaged over all columns: [rows]."""
        total = torch.zeros(self.problem.x.shape[0], dtype=torch.float64, device=self.device)
        for columns, _, margins in self:
            total += columns.loss.curvature(margins).sum(dim=0)
        return total / self.n_columns

    def _prepare(self, place: int) -> None:
        self._place = place
        index = self._parts[place].to(self.device)
        target, split = index // self.problem.n_splits, index % self.problem.n_splits
        labels = self.problem.labels.to(self.device)[target]
        loss = Loss.of(labels, balanced(labels, self.problem.weight.to(self.device)[split]))
        self._columns = self.design.columns(index, split, loss)
        theta = self._theta[place]
        self._margins = self._columns.margins(theta) if bool(theta.any()) else torch.zeros_like(loss.weight)
