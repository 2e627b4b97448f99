"""Selectivity: what person-grouped, cross-validated probes read from an activation and from its reconstruction.

    plan = FoldPlan.build(labels, groups, weights=None, n_folds=5, n_repeats=5, seed=0)
    model = fit_model(plan, x, backend)                  # once per layer and task set
    for recon in recons_of_several_saes:
        results = measure(out_of_fold(plan, model, recon, backend))

Balanced accuracy of out-of-fold predictions, the same folds for every view; delta is the SAE's minus the model's.
A person is never on both sides of a split, so a label that is random by person scores 1/2 (the control task of
Hewitt & Liang 2019, arXiv 1909.03368).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import softplus

from probes import ProbeBackend, ProbeProblem
from uncertainty import balanced_mean, estimate_delta

DEFAULT_CS = tuple(10.0**k for k in range(-5, 2))
Key = TypeVar("Key")


@dataclass(frozen=True)
class Skipped:
    """Why a target has no numbers, and what it would have rested on."""

    reason: str
    n_rows: int
    n_people: int
    n_pos: int


@dataclass(frozen=True)
class FoldPlan:
    """Which rows are held out when: R partitions into K folds, shared by all targets and views of a task set.

    Targets on the same rows share partitions that are stratified by all of their labels at once, so that one
    matrix serves them all. Targets that cannot be measured are in `skipped`, not in `labels`.
    """

    labels: NDArray[np.bool_]  # [kept targets, rows]
    kept: tuple[int, ...]  # their places among the targets asked for
    skipped: Mapping[int, Skipped]
    groups: NDArray[np.int64]  # [rows], the person
    weights: NDArray[np.float64]  # [rows]
    folds: NDArray[np.int8]  # [repeats, rows], the fold that holds the row out
    n_folds: int

    @classmethod
    def build(
        cls, labels: ArrayLike, groups: ArrayLike, weights: ArrayLike | None, n_folds: int, n_repeats: int, seed: int
    ) -> FoldPlan:
        """labels bool [targets, rows], groups int [rows], weights [rows] (None: 1 each). Deterministic by seed.

        Raises ValueError for shapes that do not fit, fewer than 2 folds or no repeat.
        """
        asked = np.asarray(labels, dtype=bool)
        people = np.asarray(groups, dtype=np.int64)
        weight = np.ones(len(people)) if weights is None else np.asarray(weights, dtype=np.float64)
        if asked.ndim != 2 or asked.shape[1:] != people.shape or weight.shape != people.shape:
            raise ValueError(f"labels {asked.shape} do not fit groups {people.shape} and weights {weight.shape}")
        if not 2 <= n_folds <= 127 or n_repeats < 1:
            raise ValueError(f"2 to 127 folds and 1 repeat or more are needed, not {n_folds} and {n_repeats}")
        skipped = {t: reason for t, row in enumerate(asked) if (reason := _too_few_people(row, people, n_folds))}
        kept = tuple(t for t in range(len(asked)) if t not in skipped)
        folds = np.zeros((n_repeats, len(people)), dtype=np.int8)
        if kept:
            seeds = np.random.SeedSequence(seed).generate_state(n_repeats)
            folds = np.stack([grouped_stratified_folds(asked[list(kept)], people, n_folds, int(s)) for s in seeds])
        return cls(asked[list(kept)], kept, skipped, people, weight, folds, n_folds)

    @property
    def n_repeats(self) -> int:
        return len(self.folds)

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """[splits, rows]; split = repeat * n_folds + fold."""
        return (self.folds[:, None] == np.arange(self.n_folds)[:, None]).reshape(-1, self.folds.shape[1])

    def training_weight(self, device: torch.device) -> Tensor:
        """float64 [splits, rows], 0 where held out."""
        return torch.from_numpy(np.where(self.held_out, 0.0, self.weights)).to(device)


def _too_few_people(labels: NDArray[np.bool_], groups: NDArray[np.int64], n_folds: int) -> Skipped | None:
    sides = {"positive": labels, "negative": ~labels}
    people = {name: len(np.unique(groups[rows])) for name, rows in sides.items()}
    rarer = min(people, key=lambda name: people[name])
    if people[rarer] >= n_folds:
        return None
    reason = f"the {rarer} class has {people[rarer]} people, fewer than the {n_folds} folds"
    return Skipped(reason, len(labels), len(np.unique(groups)), int(labels.sum()))


def grouped_stratified_folds(labels: ArrayLike, groups: ArrayLike, n_folds: int, seed: int) -> NDArray[np.int8]:
    """A fold for each row `[rows]` such that no group is in two folds, and sizes and classes are close to equal.

    labels bool [rows] or [targets, rows]. Groups with the same counts of rows and positives are interchangeable:
    they are dealt evenly at random. The few left over go one by one, the largest first (in powers of 2, at random
    within), each to the fold that has least of what the group brings. Deterministic by seed.
    """
    random = np.random.default_rng(seed)
    _, person = np.unique(np.asarray(groups), return_inverse=True)
    counts = _counts_by_person(np.atleast_2d(np.asarray(labels, dtype=bool)), person)
    _, kind = np.unique(counts, axis=0, return_inverse=True)
    shuffled = random.permutation(len(counts))
    by_kind = shuffled[np.argsort(kind.ravel()[shuffled], kind="stable")]
    n_of_kind = np.bincount(kind.ravel())
    place = np.arange(len(counts)) - np.repeat(np.cumsum(n_of_kind) - n_of_kind, n_of_kind)
    dealt = place < np.repeat(n_of_kind - n_of_kind % n_folds, n_of_kind)
    fold = np.empty(len(counts), dtype=np.int8)
    fold[by_kind[dealt]] = place[dealt] % n_folds
    left = random.permutation(by_kind[~dealt])
    left = left[np.argsort(-np.floor(np.log2(counts[left, 0])), kind="stable")]
    _deal_greedily(fold, left, counts, random.permutation(n_folds))
    return fold[person]


def _counts_by_person(labels: NDArray[np.bool_], person: NDArray[np.intp]) -> NDArray[np.float64]:
    """[persons, 1 + targets]: rows, and positives of each target."""
    return np.stack([np.bincount(person), *(np.bincount(person, weights=row) for row in labels)], axis=1)


def _deal_greedily(
    fold: NDArray[np.int8], left: NDArray[np.intp], counts: NDArray[np.float64], order: NDArray[np.intp]
) -> None:
    """Give each person of `left` the fold (ties by `order`) where the squared shares of rows and classes grow least."""
    cells = np.concatenate([counts, counts[:, :1] - counts[:, 1:]], axis=1)  # rows, positives, negatives
    cells /= np.maximum(cells.sum(axis=0), 1)
    filled = np.zeros((len(order), cells.shape[1]))
    for person in left:
        least = int(np.argmin(filled @ cells[person]))
        filled[least] += cells[person]
        fold[person] = order[least]


@dataclass(frozen=True)
class ViewFit:
    """The probes of one view, at the C chosen for each fold, and their scores on the rows they have not seen."""

    scores: Tensor  # float32 [targets, repeats, rows]; positive = the label is predicted
    chosen_c: NDArray[np.float64]  # [targets, repeats, folds]
    coef: Tensor  # float64 [targets, splits, d]
    intercept: Tensor  # float64 [targets, splits]
    n_unconverged: NDArray[np.int64]  # [targets], of its Cs x splits fits
    n_iter: NDArray[np.int64]  # [targets], the most that a fit took


@dataclass(frozen=True)
class ModelFit:
    """The model view: its activations, the scaling that every other view shares, and its probes."""

    x: Tensor  # [rows, d]
    scale: Tensor  # float64 [splits, d]
    fit: ViewFit
    cs: tuple[float, ...]


@dataclass(frozen=True)
class OutOfFold:
    """Scores of rows by probes that have not seen their person: all that the statistics need."""

    plan: FoldPlan
    views: tuple[str, ...]  # "model", "sae", and "error" if asked for
    scores: NDArray[np.float32]  # [views, targets, repeats, rows]
    transfer: NDArray[np.float32]  # [targets, repeats, rows]: probes fitted on the model's view, tested on the SAE's
    chosen_c: NDArray[np.float64]  # [views, targets, repeats, folds]
    n_unconverged: NDArray[np.int64]  # [views, targets]
    n_iter: NDArray[np.int64]  # [views, targets]


@dataclass(frozen=True)
class ProbeResult:
    """One target's selectivities; means over the partitions. `q_value` is the caller's, over all it tests."""

    model_sel: float  # balanced accuracy, 1/2 = nothing known
    sae_sel: float
    delta_sel: float  # sae_sel - model_sel; 0 = preserved, negative = lost
    ci_low: float  # 95 % interval of delta_sel
    ci_high: float
    p_value: float  # two-sided, of delta_sel = 0
    transfer_sel: float
    transfer_delta: float  # transfer_sel - model_sel
    error_sel: float | None  # None: that view was not asked for
    n_rows: int
    n_people: int
    n_pos: int
    C: float  # median of the folds' choices for the model's view, and below for the SAE's
    C_sae: float
    converged: bool  # all fits of all views
    n_unconverged: int
    n_iter: int  # the most that a fit took


def fit_model(plan: FoldPlan, x: Tensor, backend: ProbeBackend, cs: Sequence[float] = DEFAULT_CS) -> ModelFit:
    """Probes on the model's activations x `[rows, d]`, with the scaling for all views of these rows."""
    scale = training_scales(plan, x)
    return ModelFit(x, scale, fit_view(plan, x, scale, backend, cs), tuple(cs))


def out_of_fold(
    plan: FoldPlan, model: ModelFit, recon: Tensor, backend: ProbeBackend, error_view: bool = False
) -> OutOfFold:
    """The model's view beside an SAE's reconstruction `[rows, d]` of it, and beside what that leaves out.

    A reconstruction equal to x bit by bit shares the model's fit: its delta and transfer are exactly 0.
    """
    if torch.equal(recon, model.x):
        views, transfer = {"model": model.fit, "sae": model.fit}, model.fit.scores
    else:
        views = {"model": model.fit, "sae": fit_view(plan, recon, model.scale, backend, model.cs)}
        transfer = transfer_scores(plan, model.fit, recon)
    if error_view:
        views["error"] = fit_view(plan, model.x - recon, model.scale, backend, model.cs)
    return OutOfFold(
        plan=plan,
        views=tuple(views),
        scores=np.stack([fit.scores.cpu().numpy() for fit in views.values()]),
        transfer=transfer.cpu().numpy(),
        chosen_c=np.stack([fit.chosen_c for fit in views.values()]),
        n_unconverged=np.stack([fit.n_unconverged for fit in views.values()]),
        n_iter=np.stack([fit.n_iter for fit in views.values()]),
    )


def training_scales(plan: FoldPlan, x: Tensor) -> Tensor:
    """Weighted standard deviations of x `[rows, d]` over each split's training rows, float64 [splits, d].

    0 where a feature is constant there, to the precision of the sums.
    """
    weight = plan.training_weight(x.device)
    centred = x.double() - x.double().mean(dim=0)
    total = weight.sum(dim=1, keepdim=True)
    mean, square = weight @ centred / total, weight @ centred.square() / total
    variance = square - mean.square()
    rounding = 1e-13 * square + (1e-12 * x.double().mean(dim=0)).square()
    return torch.where(variance > rounding, variance, torch.zeros_like(variance)).sqrt()


def fit_view(
    plan: FoldPlan, x: Tensor, scale: Tensor, backend: ProbeBackend, cs: Sequence[float] = DEFAULT_CS
) -> ViewFit:
    """Fit probes on every training split of a view x `[rows, d]`, and choose C for each fold by the other folds."""
    labels = torch.from_numpy(plan.labels).to(x.device)
    fits = backend.fit(ProbeProblem(x, labels, plan.training_weight(x.device), scale, tuple(cs)))
    scores = _held_out_scores(plan, x, fits.coef, fits.intercept)
    choice = choose_c(plan, scores)  # [targets, repeats, folds]
    by_split = choice.flatten(1)[None]  # [1, targets, splits]
    wide = by_split[..., None].expand(-1, -1, -1, x.shape[1])
    folds = torch.from_numpy(plan.folds.astype(np.int64)).to(x.device)
    by_row = choice.gather(2, folds.expand(len(labels), -1, -1))  # [targets, repeats, rows]
    return ViewFit(
        scores=scores.gather(0, by_row[None])[0].float(),
        chosen_c=np.array(cs)[choice.cpu().numpy()],
        coef=fits.coef.gather(0, wide)[0],
        intercept=fits.intercept.gather(0, by_split)[0],
        n_unconverged=(~fits.converged).sum(dim=(0, 2)).cpu().numpy(),
        n_iter=fits.n_iter.amax(dim=(0, 2)).cpu().numpy(),
    )


def transfer_scores(plan: FoldPlan, fit: ViewFit, x: Tensor) -> Tensor:
    """Scores float32 [targets, repeats, rows] of another view x `[rows, d]` by the fold's own probes of `fit`."""
    return _held_out_scores(plan, x, fit.coef[None], fit.intercept[None])[0].float()


def _held_out_scores(plan: FoldPlan, x: Tensor, coef: Tensor, intercept: Tensor) -> Tensor:
    """Scores float64 [cs, targets, repeats, rows], each row's by the split that holds it out.

    coef [cs, targets, splits, d], intercept [cs, targets, splits].
    """
    scores = torch.empty(*coef.shape[:2], *plan.folds.shape, dtype=torch.float64, device=x.device)
    for split, held_out in enumerate(torch.from_numpy(plan.held_out).to(x.device)):
        rows = torch.nonzero(held_out)[:, 0]
        found = coef[:, :, split] @ x[rows].double().T + intercept[:, :, split, None]
        scores[:, :, split // plan.n_folds, rows] = found
    return scores


def choose_c(plan: FoldPlan, scores: Tensor) -> Tensor:
    """The index of C for each fold, int64 [targets, repeats, folds], from scores [cs, targets, repeats, rows].

    The fold's own rows have no say: the C with the least class-balanced log loss of the out-of-fold scores of the
    other folds; the smallest of equals.
    """
    labels = torch.from_numpy(plan.labels).to(scores.device)
    weights = torch.from_numpy(plan.weights).to(scores.device)
    member = torch.from_numpy(plan.held_out).to(scores.device).double().unflatten(0, (plan.n_repeats, plan.n_folds))
    loss = softplus(torch.where(labels[:, None], -scores, scores))
    mean = torch.zeros(1, dtype=torch.float64, device=scores.device)
    for label in (False, True):
        weight = weights * (labels == label)  # [targets, rows]
        summed = torch.einsum("ctri,ti,rki->ctrk", loss, weight, member)
        count = torch.einsum("ti,rki->trk", weight, member)
        mean = mean + (summed.sum(-1, keepdim=True) - summed) / (count.sum(-1, keepdim=True) - count)
    return mean.argmin(dim=0)


def measure(found: OutOfFold) -> list[ProbeResult | Skipped]:
    """A result for every target asked for, in their order."""
    plan = found.plan
    measured = {place: _measure_target(found, t) for t, place in enumerate(plan.kept)}
    everything: dict[int, ProbeResult | Skipped] = {**plan.skipped, **measured}
    return [everything[place] for place in sorted(everything)]


def _measure_target(found: OutOfFold, t: int) -> ProbeResult:
    plan, labels = found.plan, found.plan.labels[t]
    correct = {name: (found.scores[v, t] > 0) == labels for v, name in enumerate(found.views)}  # [repeats, rows]
    correct["transfer"] = (found.transfer[t] > 0) == labels
    sel = {name: float(balanced_mean(hits, labels, plan.weights).mean()) for name, hits in correct.items()}
    change = correct["sae"].astype(np.float64) - correct["model"]
    delta = estimate_delta(change, labels, plan.groups, plan.weights)
    typical_c = np.exp(np.median(np.log(found.chosen_c[:, t]), axis=(1, 2)))  # [views]
    return ProbeResult(
        model_sel=sel["model"],
        sae_sel=sel["sae"],
        delta_sel=delta.value,
        ci_low=delta.low,
        ci_high=delta.high,
        p_value=delta.p_value,
        transfer_sel=sel["transfer"],
        transfer_delta=sel["transfer"] - sel["model"],
        error_sel=sel.get("error"),
        n_rows=len(labels),
        n_people=len(np.unique(plan.groups)),
        n_pos=int(labels.sum()),
        C=float(typical_c[found.views.index("model")]),
        C_sae=float(typical_c[found.views.index("sae")]),
        converged=not found.n_unconverged[:, t].any(),
        n_unconverged=int(found.n_unconverged[:, t].sum()),
        n_iter=int(found.n_iter[:, t].max()),
    )


def measure_site(
    plan: FoldPlan, x: Tensor, recons: Mapping[Key, Tensor], backend: ProbeBackend, error_view: bool = False
) -> dict[Key, list[dict[str, Any]]]:
    """Every SAE's results at one site as JSON-ready records, one per target; the model's view is fitted once.

    x and recons [rows, d]. A target without numbers has None for them and a `reason`.
    """
    if not plan.kept:
        return {key: [as_record(plan.skipped[t]) for t in sorted(plan.skipped)] for key in recons}
    model = fit_model(plan, x, backend)
    return {
        key: [as_record(result) for result in measure(out_of_fold(plan, model, recon, backend, error_view))]
        for key, recon in recons.items()
    }


def as_record(result: ProbeResult | Skipped) -> dict[str, Any]:
    """Plain numbers by the names of `ProbeResult`; `error_sel` only where that view was measured."""
    if isinstance(result, Skipped):
        return {**{field.name: None for field in fields(ProbeResult) if field.name != "error_sel"}, **asdict(result)}
    record = asdict(result)
    if record["error_sel"] is None:
        del record["error_sel"]
    return record
