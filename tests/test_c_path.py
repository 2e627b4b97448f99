"""The choice of C: the path ends early only where larger C are worse, and the choice is that among all C."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from delta_selectivity.probing.backends import torch_lbfgs
from delta_selectivity.probing.backends.problem import Path, ProbeFits, ProbeProblem
from delta_selectivity.probing.backends.sklearn_reference import SklearnReference
from delta_selectivity.probing.backends.torch_lbfgs import TorchLbfgs
from delta_selectivity.probing.c_path import RISE, CPath, out_of_fold_losses
from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.selectivity import DEFAULT_CS, fit_view, training_scales
from delta_selectivity.system.out_of_memory import MemoryBudget

N_CS = len(DEFAULT_CS)


def world(rows: int = 400, d: int = 16, signals: tuple[float, ...] = (1.0,), seed: int = 0) -> tuple[Tensor, FoldPlan]:
    """Return features [rows, d] of groups of four rows, and a plan with a target for each strength of the signal."""
    random = np.random.default_rng(seed)
    groups = np.arange(rows) // 4
    labels = random.random((len(signals), groups.max() + 1)) < 0.4
    x = random.normal(size=(rows, d)) + random.normal(size=(groups.max() + 1, d))[groups]
    for t, strength in enumerate(signals):
        x[:, t] += strength * labels[t, groups]
    plan = FoldPlan.build(labels[:, groups], groups, None, n_folds=5, n_repeats=2, seed=seed)
    return torch.from_numpy(x).float(), plan


class Recorder:
    """A backend that keeps its fits, at every C if `whole`."""

    name = "recorder"

    def __init__(self, backend: TorchLbfgs | SklearnReference, whole: bool = False) -> None:
        self.backend, self.whole = backend, whole
        self.fits: ProbeFits

    def fit(self, problem: ProbeProblem, path: Path | None = None) -> ProbeFits:
        self.fits = self.backend.fit(problem, None if self.whole else path)
        return self.fits


def held_out(plan: FoldPlan, x: Tensor, fits: ProbeFits) -> Tensor:
    """Return [cs, targets, repeats, rows], each row scored by the split that holds it out, one at a time."""
    scores = torch.empty(len(fits.coef), len(plan.labels), *plan.folds.shape, dtype=torch.float64)
    for repeat, folds in enumerate(plan.folds):
        for row, fold in enumerate(folds):
            split = repeat * plan.n_folds + int(fold)
            scores[:, :, repeat, row] = fits.coef[:, :, split] @ x[row].double() + fits.intercept[:, :, split]
    return scores


CASES = {
    "strong": {"d": 64, "signals": (3.0,)},
    "none": {"signals": (0.0,)},
    "several": {"d": 64, "signals": (3.0, 1.0, 0.0)},
    "more features than rows": {"rows": 80, "d": 120, "signals": (2.0, 0.5)},
}


@pytest.mark.parametrize("backend", [TorchLbfgs(), SklearnReference()], ids=["torch", "sklearn"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_choices_and_scores_are_those_of_a_search_among_all_c(case, backend):
    x, plan = world(**case)
    scale, recorder = training_scales(plan, x), Recorder(backend)
    found = fit_view(plan, x, scale, recorder)
    assert not recorder.fits.fitted[-1].any(), "no target needs the largest C"
    whole = Recorder(backend, whole=True)
    labels, weight = torch.from_numpy(plan.labels), plan.training_weight(x.device)
    whole.fit(ProbeProblem(x, labels, weight, scale, DEFAULT_CS))
    assert whole.fits.fitted.all()
    scores = held_out(plan, x, whole.fits)
    choice = out_of_fold_losses(plan, scores).argmin(dim=0)
    np.testing.assert_array_equal(found.chosen_c, np.array(DEFAULT_CS)[choice.numpy()])
    for t, repeat in np.ndindex(scores.shape[1:3]):
        c = choice[t, repeat, torch.from_numpy(plan.folds[repeat].astype(np.int64))]
        expected = scores[:, t, repeat].gather(0, c[None])[0]
        torch.testing.assert_close(found.scores[t, repeat].double(), expected, rtol=1e-5, atol=1e-5)
    by_split = choice.flatten(1)
    for t, split in np.ndindex(by_split.shape):
        coef = whole.fits.coef[by_split[t, split], t, split]
        torch.testing.assert_close(found.coef[t, split], coef, rtol=1e-4, atol=1e-6)


def test_the_loss_is_a_plain_mean_over_the_other_folds():
    _, plan = world(signals=(1.0, 0.0))
    scores = torch.randn(2, 2, 2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = out_of_fold_losses(plan, scores)
    for c, t, repeat, fold in np.ndindex(found.shape):
        others = plan.folds[repeat] != fold
        label, score = plan.labels[t][others], scores[c, t, repeat].numpy()[others]
        loss = np.log1p(np.exp(np.where(label, -score, score)))
        assert found[c, t, repeat, fold] == pytest.approx((loss[label].mean() + loss[~label].mean()) / 2)


def record(path: CPath, plan: FoldPlan, losses: list[float]) -> Tensor:
    """Record margins of 400 rows that give each target about this loss, and advance."""
    labels = torch.from_numpy(plan.labels)
    margins = torch.stack(
        [torch.where(of, 1.0, -1.0) * -np.log(np.expm1(v)) for of, v in zip(labels, losses, strict=True)]
    )
    splits = len(plan.held_out)
    path.record(torch.arange(len(losses) * splits), margins.double().repeat_interleave(splits, 0))
    return path.advance()


def test_a_path_ends_where_the_loss_has_risen():
    _, plan = world(signals=(1.0, 0.0, 0.0))
    path = CPath(plan, torch.device("cpu"))
    path.begin(slice(0, 3))
    assert record(path, plan, [0.6, 0.5, 0.5]).tolist() == [True, True, True]
    assert record(path, plan, [0.5, 0.5 + 0.9 * RISE, 0.5 + 1.1 * RISE]).tolist() == [True, True, False]
    assert record(path, plan, [0.4, 0.4, 0.3]).tolist() == [True, True, False], "ended is ended"
    assert path.choice.flatten(1).unique(dim=1).tolist() == [[2], [2], [0]]
    assert record(path, plan, [0.4 + 1.1 * RISE, 0.4, 0.3]).tolist() == [False, True, False]
    path.begin(slice(0, 3))
    assert record(path, plan, [0.9, 0.9, 0.9]).tolist() == [True, True, True], "from the beginning"
    assert (path.choice == 0).all()


def test_a_fold_whose_loss_still_falls_keeps_the_path_open():
    _, plan = world()
    path = CPath(plan, torch.device("cpu"))
    path.begin(slice(0, 1))
    record(path, plan, [0.5])
    label = torch.where(torch.from_numpy(plan.labels[0]), 1.0, -1.0)
    better = torch.from_numpy(plan.folds[0] != 0)  # all folds but the first, of the first partition: read by that one
    margins = torch.where(better, 3.0, -1.0) * label
    path.record(torch.arange(len(plan.held_out)), margins.double().expand(len(plan.held_out), -1))
    assert path.advance().tolist() == [True]
    assert path.choice[0, 0, 0] == 1


def test_parts_of_any_size_give_the_same(monkeypatch):
    """Columns of a target may be in several parts, and are dropped from each."""
    x, plan = world(signals=(3.0, 1.0, 0.0))
    scale = training_scales(plan, x)
    expected = fit_view(plan, x, scale, TorchLbfgs())
    for room in (1, 4, 16):
        budget = MemoryBudget("probes are fitted")
        budget.halve(2 * room, torch_lbfgs.DenseDesign.build(problem_of(plan, x, scale)).column_bytes)
        backend = TorchLbfgs()
        object.__setattr__(backend, "_budget", budget)
        found = fit_view(plan, x, scale, backend)
        np.testing.assert_array_equal(found.chosen_c, expected.chosen_c)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


def problem_of(plan: FoldPlan, x: Tensor, scale: Tensor) -> ProbeProblem:
    return ProbeProblem(x, torch.from_numpy(plan.labels), plan.training_weight(x.device), scale, DEFAULT_CS)


def test_what_is_not_fitted_is_not_counted_as_unconverged():
    x, plan = world(d=64, signals=(0.0,))
    recorder = Recorder(TorchLbfgs(max_iter=1))
    found = fit_view(plan, x, training_scales(plan, x), recorder)
    fits = recorder.fits
    n_fitted = int(fits.fitted.sum())
    assert 0 < n_fitted < N_CS
    assert 0 < found.n_unconverged[0] <= n_fitted * len(plan.held_out)
    assert not fits.coef[~fits.fitted].any()


def test_non_finite_margins_end_no_path_and_are_not_chosen():
    _, plan = world()
    path = CPath(plan, torch.device("cpu"))
    path.begin(slice(0, 1))
    record(path, plan, [0.5])
    index = torch.arange(len(plan.held_out))
    path.record(index, torch.full((len(index), 400), torch.nan, dtype=torch.float64))
    assert path.advance().tolist() == [True]
    assert (path.choice == 0).all()
    assert path.scores.isfinite().all()


@pytest.mark.slow
def test_few_choices_differ_in_hard_worlds():
    """Few groups, groups that say more than labels, signals in the direction of least variance."""
    random, n, different = np.random.default_rng(0), 0, 0
    for _ in range(300):
        rows, d = int(random.choice([150, 400, 1000])), int(random.choice([8, 64, 256]))
        n_groups = int(random.choice([12, 25, 60, rows]))
        groups = random.integers(0, n_groups, rows)
        labels = (random.random(n_groups) < random.choice([0.1, 0.3, 0.5]))[groups]
        latent = random.normal(size=(rows, d)) + random.choice([0, 1, 4]) * random.normal(size=(n_groups, d))[groups]
        latent[:, random.choice([0, -1])] += random.choice([0, 0.3, 1, 4]) * labels
        latent *= np.arange(1, d + 1) ** -float(random.choice([0, 1, 2]))
        x = torch.from_numpy(latent @ np.linalg.qr(random.normal(size=(d, d)))[0]).float()
        plan = FoldPlan.build(labels[None], groups, None, n_folds=5, n_repeats=2, seed=0)
        if not plan.kept:
            continue
        scale, whole = training_scales(plan, x), Recorder(TorchLbfgs(), whole=True)
        whole.fit(problem_of(plan, x, scale))
        expected = out_of_fold_losses(plan, held_out(plan, x, whole.fits)).argmin(dim=0).numpy()
        found = fit_view(plan, x, scale, TorchLbfgs()).chosen_c
        different += int((found != np.array(DEFAULT_CS)[expected]).sum())
        n += expected.size
    assert n > 2000
    assert different <= 0.001 * n
