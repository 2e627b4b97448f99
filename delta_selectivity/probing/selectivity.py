"""Selectivity of person-grouped, cross-validated probes on activations and on their reconstruction.

    plan = FoldPlan.build(labels, groups, weights=None, n_folds=5, n_repeats=5, seed=0)
    model = fit_model(plan, x, backend)                  # once per layer and task set
    for recon in recons_of_several_saes:
        results = measure(out_of_fold(plan, model, recon, backend))   # ProbeResult or Skipped, one per target

Selectivity is the balanced accuracy of out-of-fold predictions, with the same folds (`folds`) for every view. delta is
the SAE's selectivity minus the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delta_selectivity.probing.c_path import CPath
from delta_selectivity.probing.folds import FoldPlan, Skipped
from delta_selectivity.probing.probe_statistics import EPSILON, K_VIEWS, ProbeScores, Statistics, quantised, statistics
from delta_selectivity.probing.probes import ProbeBackend, ProbeProblem
from delta_selectivity.system.out_of_memory import MemoryBudget

DEFAULT_CS = tuple(10.0**k for k in range(-5, 2))
VIEWS = ("model", "sae", "transfer", "error", "latents")
OUTLIER = 10.0
"""Multiple of the median norm above which a row or token is an outlier, usually an attention sink."""
_BUDGET = MemoryBudget("targets are scored")
OPTIONAL = {f"{view}_{score}" for view in ("error", "latent") for score in ("sel", "auc", "bits")}
OPTIONAL |= {f"{view}_{score}" for view in K_VIEWS for score in ("sel", "ci_low", "ci_high", "auc")}
"""Keys that a record has only if the view was requested."""


@dataclass(frozen=True)
class ViewFit:
    """The probes of one view, at the C chosen for each fold, and their scores on held-out rows."""

    scores: Tensor  # float32 [targets, repeats, rows]; a positive score predicts the label
    chosen_c: NDArray[np.float64]  # [targets, repeats, folds]
    coef: Tensor  # float64 [targets, splits, d]
    intercept: Tensor  # float64 [targets, splits]
    n_unconverged: NDArray[np.int64]  # [targets], of the fits
    n_iter: NDArray[np.int64]  # [targets], the maximum over its fits


@dataclass(frozen=True)
class ModelFit:
    """The model view: its activations, the scaling that every other view shares, and its probes."""

    x: Tensor  # [rows, d]
    scale: Tensor  # float64 [splits, d]
    fit: ViewFit
    cs: tuple[float, ...]
    control: ProbeScores | None  # scores of the control task, if requested

    @cached_property
    def outliers(self) -> NDArray[np.bool_]:
        """Mask [rows] of rows whose norm is above `OUTLIER` times the median."""
        norms = torch.linalg.vector_norm(self.x.double(), dim=1)
        return np.asarray((norms > OUTLIER * norms.median()).cpu().numpy())


@dataclass(frozen=True)
class OutOfFold:
    """Out-of-fold scores: each row is scored by probes trained without its person; with the facts of the fits."""

    plan: FoldPlan
    views: tuple[str, ...]  # model, sae, transfer (the model's probes on the SAE's view), error, latents, k1 ...
    scores: NDArray[np.float16]  # [views, targets, repeats, rows]
    fits: Mapping[str, FitFacts]  # by view; transfer has no fit of its own
    outliers: NDArray[np.bool_]  # [rows], of the model's view
    control: ProbeScores | None  # scores of the control task, if requested

    @property
    def transfer(self) -> NDArray[np.float16]:
        """Scores [targets, repeats, rows] of probes fitted on the model's view and tested on the SAE's."""
        return self.scores[self.views.index("transfer")]

    def probe(self, t: int) -> ProbeScores:
        """Return the scores of the t-th measured target."""
        plan = self.plan
        return ProbeScores(
            views={view: self.scores[v, t] for v, view in enumerate(self.views)},
            labels=plan.labels[t],
            persons=plan.groups,
            weights=plan.weights,
            folds=plan.folds,
            outliers=self.outliers if self.outliers.any() else None,
            control_scores=None if self.control is None else self.control.views["model"][0],
            control_labels=None if self.control is None else self.control.labels,
        )


@dataclass(frozen=True)
class FitFacts:
    """How the probes of one view were fitted."""

    chosen_c: NDArray[np.float64]  # [targets, repeats, folds]
    n_unconverged: NDArray[np.int64]  # [targets]
    n_iter: NDArray[np.int64]  # [targets]


@dataclass(frozen=True, kw_only=True)
class ProbeResult(Statistics):
    """One target's statistics, and how its probes were fitted."""

    C: float  # geometric median of the folds' choices for the model's view
    C_sae: float  # the same for the SAE's view
    converged: bool  # whether all fits of all views converged
    n_unconverged: int  # fits that did not converge
    n_iter: int  # maximum over the fits


FitModel = Callable[[FoldPlan, Tensor, ProbeBackend, FoldPlan | None], ModelFit]
"""Function that fits the model's view: `fit_model` at `DEFAULT_CS`, or a cache of its results."""


def fit_model(
    plan: FoldPlan,
    x: Tensor,
    backend: ProbeBackend,
    control: FoldPlan | None = None,
    cs: Sequence[float] = DEFAULT_CS,
) -> ModelFit:
    """Fit probes on the model's activations x `[rows, d]`, and compute the scaling for all views of these rows.

    With a plan from `folds.control_plan`, the probe of the control task is fitted too.
    """
    scale = training_scales(plan, x)
    fit, known = fit_view(plan, x, scale, backend, cs), None
    if control is not None:
        of_control = fit_view(control, x, training_scales(control, x), backend, cs)
        known = control_scores(control, _to_float16(of_control.scores)[0])
    return ModelFit(x, scale, fit, tuple(cs), known)


def control_scores(plan: FoldPlan, scores: NDArray[np.float16]) -> ProbeScores:
    """Return the scores [repeats, rows] of the control task's probe, with their labels and weights."""
    return ProbeScores({"model": scores}, plan.labels[0], plan.groups, plan.weights, plan.folds)


def out_of_fold(
    plan: FoldPlan,
    model: ModelFit,
    recon: Tensor | ViewFit,
    backend: ProbeBackend,
    error_view: bool = False,
    latents: Tensor | None = None,
) -> OutOfFold:
    """Score the model's view and an SAE's reconstruction `[rows, d]`, and the reconstruction error if `error_view`.

    A reconstruction equal to x bit by bit shares the model's fit, so its deltas are exactly 0. Instead of a
    reconstruction, the fit of another view of the rows may be given (`fit_sparse`); then there are no views transfer
    and error. `latents`, float32 `[rows, d_sae]` in sparse CSR, are the SAE's codes for the view of that name.
    """
    fits, scores = {"model": model.fit}, {"model": model.fit.scores}
    if isinstance(recon, ViewFit):
        fits["sae"] = recon
    elif torch.equal(recon, model.x):
        fits["sae"] = model.fit
        scores["transfer"] = model.fit.scores
    else:
        fits["sae"] = fit_view(plan, recon, model.scale, backend, model.cs)
        scores["transfer"] = transfer_scores(plan, model.fit, recon)
    if error_view and not isinstance(recon, ViewFit):
        fits["error"] = fit_view(plan, model.x - recon, model.scale, backend, model.cs)
    if latents is not None:
        fits["latents"] = fit_sparse(plan, latents, backend, model.cs)
    scores |= {name: fit.scores for name, fit in fits.items()}
    views = tuple(view for view in VIEWS if view in scores)
    return OutOfFold(
        plan=plan,
        views=views,
        scores=np.stack([_to_float16(scores[view]) for view in views]),
        fits={name: FitFacts(fit.chosen_c, fit.n_unconverged, fit.n_iter) for name, fit in fits.items()},
        outliers=model.outliers,
        control=model.control,
    )


def _to_float16(scores: Tensor) -> NDArray[np.float16]:
    return quantised(scores.cpu().numpy())


def fit_sparse(plan: FoldPlan, x: Tensor, backend: ProbeBackend, cs: Sequence[float] = DEFAULT_CS) -> ViewFit:
    """Fit probes on a sparse CSR matrix `[rows, d]`, unscaled, because scaling rare latents to unit variance hurts."""
    x = _live_columns(x)
    one = torch.ones(1, 1, dtype=torch.float64, device=x.device)
    return fit_view(plan, x, one.expand(len(plan.held_out), x.shape[1]), backend, cs)


def _live_columns(x: Tensor) -> Tensor:
    """Return a sparse CSR matrix without its empty columns (keep one if all are empty)."""
    live, place = torch.unique(x.col_indices(), return_inverse=True)
    shape = (x.shape[0], max(len(live), 1))
    return torch.sparse_csr_tensor(x.crow_indices(), place, x.values(), shape, check_invariants=False)


def training_scales(plan: FoldPlan, x: Tensor) -> Tensor:
    """Return the weighted standard deviations of x `[rows, d]` over each split's training rows, float64 [splits, d].

    The value is 0 if a feature is constant to the precision of the sums, or if its deviation is below a normal float32.
    """
    weight, x = plan.training_weight(x.device), x.double()
    middle = x.mean(dim=0)
    centred = x - middle
    total = weight.sum(dim=1, keepdim=True)
    mean, square = weight @ centred / total, weight @ centred.square() / total
    variance = square - mean.square()
    rounding = 1e-13 * square + (1e-12 * middle).square() + torch.finfo(torch.float32).tiny ** 2
    return torch.where(variance > rounding, variance, torch.zeros_like(variance)).sqrt()


def fit_view(
    plan: FoldPlan, x: Tensor, scale: Tensor, backend: ProbeBackend, cs: Sequence[float] = DEFAULT_CS
) -> ViewFit:
    """Fit probes on every training split of a view x `[rows, d]`, and choose C for each fold by the other folds.

    x may be sparse CSR; scale float64 `[splits, d]` is what its features are divided by.
    """
    if not plan.kept:
        return _no_fit(plan, x)
    labels = torch.from_numpy(plan.labels).to(x.device)
    path = CPath(plan, x.device)
    fits = backend.fit(ProbeProblem(x, labels, plan.training_weight(x.device), scale, tuple(cs)), path)
    by_split = path.choice.flatten(1)[None]  # [1, targets, splits]
    wide = by_split[..., None].expand(-1, -1, -1, x.shape[1])
    return ViewFit(
        scores=path.scores,
        chosen_c=np.array(cs)[path.choice.cpu().numpy()],
        coef=fits.coef.gather(0, wide)[0],
        intercept=fits.intercept.gather(0, by_split)[0],
        n_unconverged=(~fits.converged & fits.fitted[..., None]).sum(dim=(0, 2)).cpu().numpy(),
        n_iter=fits.n_iter.amax(dim=(0, 2)).cpu().numpy(),
    )


def _no_fit(plan: FoldPlan, x: Tensor) -> ViewFit:
    """Return a fit of zero targets."""
    none = np.empty((0, plan.n_repeats, plan.n_folds))
    coef = torch.empty(0, len(plan.held_out), x.shape[1], dtype=torch.float64, device=x.device)
    scores = torch.empty(0, *plan.folds.shape, dtype=torch.float32, device=x.device)
    return ViewFit(scores, none, coef, coef[..., 0], none[:, 0, 0].astype(np.int64), none[:, 0, 0].astype(np.int64))


def transfer_scores(plan: FoldPlan, fit: ViewFit, x: Tensor) -> Tensor:
    """Return scores float32 [targets, repeats, rows] of another view x `[rows, d]` by each fold's probes in `fit`."""
    scores = torch.empty(len(fit.coef), *plan.folds.shape, dtype=torch.float32, device=x.device)

    def score(part: slice) -> None:
        scores[part] = _held_out_scores(plan, x, fit.coef[part], fit.intercept[part]).float()

    _BUDGET.run_in_pieces(len(scores), plan.folds.size, score)
    return scores


def _held_out_scores(plan: FoldPlan, x: Tensor, coef: Tensor, intercept: Tensor) -> Tensor:
    """Return scores float64 [targets, repeats, rows], each row scored by the split that holds it out.

    coef [targets, splits, d], intercept [targets, splits].
    """
    scores = torch.empty(len(coef), *plan.folds.shape, dtype=torch.float64, device=x.device)
    for split, held_out in enumerate(torch.from_numpy(plan.held_out).to(x.device)):
        rows = torch.nonzero(held_out)[:, 0]
        found = coef[:, split] @ x[rows].double().T
        scores[:, split // plan.n_folds, rows] = found + intercept[:, split, None]
    return scores


def measure(scores: OutOfFold, epsilon: float = EPSILON) -> list[ProbeResult | Skipped]:
    """Return a result for every target in order; differences within +-epsilon count as preserved."""
    plan = scores.plan
    measured = {place: _measure_target(scores, t, epsilon) for t, place in enumerate(plan.kept)}
    everything: dict[int, ProbeResult | Skipped] = {**plan.skipped, **measured}
    return [everything[place] for place in sorted(everything)]


def _measure_target(scores: OutOfFold, t: int, epsilon: float) -> ProbeResult:
    known = statistics(scores.probe(t), epsilon)
    n_unconverged = sum(int(fit.n_unconverged[t]) for fit in scores.fits.values())
    return ProbeResult(
        **{name.name: getattr(known, name.name) for name in fields(known)},
        C=_geometric_median(scores.fits["model"].chosen_c[t]),
        C_sae=_geometric_median(scores.fits["sae"].chosen_c[t]),
        converged=n_unconverged == 0,
        n_unconverged=n_unconverged,
        n_iter=max(int(fit.n_iter[t]) for fit in scores.fits.values()),
    )


def _geometric_median(chosen_c: NDArray[np.float64]) -> float:
    return float(np.exp(np.median(np.log(chosen_c))))


def as_record(result: ProbeResult | Skipped) -> dict[str, Any]:
    """Return a dict of plain numbers by the names of `ProbeResult`; optional views only where measured.

    A skipped target has None for each number and a `reason`.
    """
    if isinstance(result, Skipped):
        return {**{item.name: None for item in fields(ProbeResult) if item.name not in OPTIONAL}, **asdict(result)}
    return {name: value for name, value in asdict(result).items() if not (value is None and name in OPTIONAL)}
