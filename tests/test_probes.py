"""The solvers compared with scikit-learn, and our side of cuML's interface with a stand-in for cuML."""

from __future__ import annotations

import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks import bench_probes
from delta_selectivity.errors import RequestError
from delta_selectivity.probing.backends import descent_kernels, lbfgs, torch_dense, torch_lbfgs
from delta_selectivity.probing.backends.cuml_qn import CumlQn
from delta_selectivity.probing.backends.problem import balanced
from delta_selectivity.probing.backends.sklearn_reference import SklearnReference
from delta_selectivity.probing.backends.torch_lbfgs import TorchLbfgs
from delta_selectivity.probing.probes import ProbeProblem, choose_backend, disagreement

CS = (1e-5, 1e-3, 1e-1, 10.0)


def problem(rows=300, d=24, noise=1.0, share=0.5, targets=1, weighted=False, cs=CS, seed=0) -> ProbeProblem:
    """Return correlated features of unequal size with a mean, three overlapping splits, labels by a few directions."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=random) * torch.arange(1, d + 1) ** -0.5
    x = (torch.randn(rows, d, generator=random) @ mixing + torch.randn(d, generator=random)) * 10
    signal = x @ torch.randn(d, targets, generator=random)
    signal = signal / signal.std(dim=0) + noise * torch.randn(rows, targets, generator=random)
    labels = (signal > signal.quantile(1 - share, dim=0)).T
    weight = torch.ones(3, rows, dtype=torch.float64)
    if weighted:
        weight = (1 / torch.randint(1, 5, (rows,), generator=random).double()).expand(3, rows).clone()
    for split in range(3):
        weight[split, split::3] = 0
    scale = torch.stack([x[row > 0].std(dim=0) for row in weight])
    return ProbeProblem(x, labels, weight, scale, cs)


HARD = {
    "dense": {},
    "nearly separable": {"noise": 0.05},
    "more features than rows": {"rows": 60, "d": 90},
    "weighted rows": {"weighted": True},
    "one in twelve": {"share": 1 / 12},
    "three targets": {"targets": 3, "share": 0.3},
}


@pytest.mark.parametrize("case", HARD.values(), ids=HARD.keys())
def test_torch_agrees_with_scikit_learn(case):
    task = problem(**case)
    ours, reference = TorchLbfgs().fit(task), SklearnReference().fit(task)
    assert ours.converged.all()
    assert reference.converged.all()
    error = (ours.coef - reference.coef).norm(dim=-1) / reference.coef.norm(dim=-1)
    assert error.max() < 1e-4
    scores, expected = (
        torch.einsum("nd,ctsd->ctsn", task.x.double(), fits.coef) + fits.intercept[..., None]
        for fits in (ours, reference)
    )
    assert ((scores - expected).abs().amax(-1) / expected.std(-1)).max() < 1e-4


LARGE = {"rows": 1400, "d": 96}  # most iterations in float32


@pytest.mark.parametrize("case", [{}, {"noise": 0.05}, {"weighted": True, "share": 0.1}, {"targets": 3}])
def test_float32_start_ends_at_the_solution_of_scikit_learn(case):
    task = problem(**LARGE, **case, cs=(1e-5, 1e-2, 10.0))
    ours, reference = TorchLbfgs().fit(task), SklearnReference().fit(task)
    assert ours.converged.all()
    assert ((ours.coef - reference.coef).norm(dim=-1) / reference.coef.norm(dim=-1)).max() < 1e-4


def test_float32_start_changes_no_score(monkeypatch):
    task, singles = problem(**LARGE, targets=2), []
    original = torch_dense.DenseColumns.in_float32
    monkeypatch.setattr(
        torch_dense.DenseColumns, "in_float32", lambda self: singles.append(original(self)) or singles[-1]
    )
    mixed = TorchLbfgs(tolerance=1e-7).fit(task)
    assert all(columns is not None for columns in singles)
    monkeypatch.setattr(torch_dense.DenseColumns, "in_float32", lambda self: None)
    double = TorchLbfgs(tolerance=1e-9).fit(task)
    scores = [torch.einsum("nd,ctsd->ctsn", task.x.double(), f.coef) + f.intercept[..., None] for f in (mixed, double)]
    assert ((scores[0] - scores[1]).abs().amax(-1) / scores[1].std(-1)).max() < 1e-6


def test_a_failed_float32_start_is_repeated_in_float64(monkeypatch):
    task = problem(**LARGE)
    expected = TorchLbfgs().fit(task)
    backward = torch_dense.CentredProducts.backward

    def fail_in_float32(self: torch_dense.CentredProducts, residual: torch.Tensor) -> torch.Tensor:
        return backward(self, residual) * (torch.nan if residual.dtype == torch.float32 else 1)

    monkeypatch.setattr(torch_dense.CentredProducts, "backward", fail_in_float32)
    fits = TorchLbfgs().fit(task)
    assert fits.converged.all()
    assert ((fits.coef - expected.coef).norm(dim=-1) / expected.coef.norm(dim=-1)).max() < 1e-5


@pytest.mark.parametrize("case", [*HARD.values(), {**LARGE, "targets": 2}], ids=[*HARD, "large"])
def test_the_compiled_loop_does_what_torch_does(case, monkeypatch):
    task, calls = problem(**case), []
    for_kernel = torch_dense.DenseColumns.for_kernel
    monkeypatch.setattr(
        torch_dense.DenseColumns, "for_kernel", lambda *given: calls.append(for_kernel(*given)) or calls[-1]
    )
    compiled = TorchLbfgs().fit(task)
    assert all(call is not None for call in calls)
    monkeypatch.setattr(torch_dense.DenseColumns, "for_kernel", lambda *given: None)
    plain = TorchLbfgs().fit(task)
    assert compiled.converged.equal(plain.converged)
    assert (compiled.n_iter - plain.n_iter).abs().max() <= 3 + plain.n_iter.max() // 10
    assert ((compiled.coef - plain.coef).norm(dim=-1) / plain.coef.norm(dim=-1)).max() < 1e-5


SEPARABLE = {"noise": 0.0, "cs": (1e-3, 1e-1, 1.0, 10.0, 100.0)}  # at large C the curvature of most rows vanishes
SLOW = {
    "in float64": {"rows": 400, "d": 150, **SEPARABLE},
    "from float32": {"rows": 1400, "d": 150, **SEPARABLE},
    "two targets": {"rows": 1400, "d": 150, "targets": 2, **SEPARABLE},
}


@pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("case", SLOW.values(), ids=SLOW.keys())
def test_separable_rows_get_a_preconditioner_for_each_column(case, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(torch_dense.DenseColumns, "for_kernel", lambda *_: None)
    task = problem(**case)
    monkeypatch.setattr(torch_lbfgs, "SLOW", np.inf)
    shared = TorchLbfgs(max_iter=3000).fit(task)
    monkeypatch.setattr(torch_lbfgs, "SLOW", 30)
    found = TorchLbfgs().fit(task)
    assert found.converged.all()
    assert 2 * found.n_iter[-1].sum() < shared.n_iter[-1].sum()
    reference = SklearnReference().fit(task)
    assert ((found.coef - reference.coef).norm(dim=-1) / reference.coef.norm(dim=-1)).max() < 1e-4


def test_own_preconditioners_are_the_columns_inverse_hessians():
    task = problem(rows=200, d=30, targets=2, weighted=True)
    design = torch_dense.DenseDesign.build(task)
    index = torch.arange(6)
    labels = task.labels[index // 3]
    loss = lbfgs.Loss.of(labels, balanced(labels, task.weight[index % 3])).scaled(0.3)
    columns, random = design.columns(index, index % 3, loss), torch.Generator().manual_seed(0)
    margins = 3 * torch.randn(6, 200, generator=random, dtype=torch.float64)
    own, v = columns.own_preconditioner(margins), torch.randn(6, 31, generator=random)
    for c, split in enumerate(columns.split):
        z = torch.cat([(task.x - design.centre) / design.divisor[split], torch.ones(200, 1)], dim=1).double()
        hessian = z.T @ (z * loss.curvature(margins)[c][:, None]) + torch.eye(31)
        hessian[-1, -1] -= 1
        expected = torch.linalg.solve(hessian, v[c].double())
        torch.testing.assert_close(own.multiply(v)[c].double(), expected, rtol=1e-3, atol=1e-4)
    some = torch.tensor([4, 1])
    assert own.select(some).multiply(v[some]).equal(own.multiply(v)[some])


def test_own_preconditioners_are_made_for_as_many_columns_as_fit_into_memory(monkeypatch):
    task, made = problem(**SLOW["in float64"]), []
    own = torch_dense.DenseColumns.own_preconditioner
    monkeypatch.setattr(
        torch_dense.DenseColumns, "own_preconditioner", lambda *given: made.append(own(*given)) or made[-1]
    )
    monkeypatch.setattr(torch_lbfgs, "SLOW", 30)
    expected = SklearnReference().fit(task)
    for most, sizes in ((3, [3]), (2, [2, 1]), (0, [])):
        made.clear()
        monkeypatch.setattr(torch_dense.DenseDesign, "max_own", most)
        found = TorchLbfgs().fit(task)
        assert found.converged.all()
        assert ((found.coef - expected.coef).norm(dim=-1) / expected.coef.norm(dim=-1)).max() < 1e-4
        assert [len(each.factor) for each in made[: len(sizes)]] == sizes and bool(made) == bool(sizes)


@pytest.mark.parametrize("fault", ["not finite", "useless"])
def test_columns_that_fail_with_their_own_preconditioner_begin_again(fault, monkeypatch):
    task, minimise = problem(**SLOW["in float64"]), torch_lbfgs.minimise

    def spoiled(columns, theta, margins, preconditioner, limits, memory):
        found = minimise(columns, theta, margins, preconditioner, limits, memory)
        if fault == "not finite" and limits.tolerance == torch_lbfgs._ROUGH:
            return replace(found, theta=found.theta * np.inf, margins=found.margins * np.nan)
        if fault == "useless" and preconditioner.factor.dim() == 3:
            return replace(found, theta=found.theta * 0, converged=found.converged & False)
        return found

    monkeypatch.setattr(torch_lbfgs, "SLOW", 30)
    monkeypatch.setattr(torch_lbfgs, "minimise", spoiled)
    found, expected = TorchLbfgs().fit(task), SklearnReference().fit(task)
    assert found.converged.all()
    assert ((found.coef - expected.coef).norm(dim=-1) / expected.coef.norm(dim=-1)).max() < 1e-4


@pytest.mark.parametrize("rows", [600, 3000])
@pytest.mark.parametrize("deviation", [1e-7, 1e-9, 1e-12])
def test_a_feature_that_the_model_hardly_varies_spoils_no_probe(deviation, rows):
    """Its reconstruction is off by many of the model's deviations; in units of them it is far larger than the rest."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 65, generator=random)
    labels = x[:, :5].sum(dim=1) + torch.randn(rows, generator=random) > 0
    scale = torch.ones(1, 65)
    scale[0, -1] = deviation
    found = TorchLbfgs().fit(ProbeProblem(x, labels[None], torch.ones(1, rows).double(), scale, CS))
    assert found.converged.all()
    for i, c in enumerate(CS):
        expected = newton(x.double().numpy(), labels.numpy(), scale[0].double().numpy(), c)
        assert np.linalg.norm(found.coef[i, 0, 0].numpy() - expected[:-1]) < 1e-4 * np.linalg.norm(expected[:-1])


def newton(x, labels, scale, c):
    """Return coefficients and intercept: balanced classes, penalty |scale x coefficients|^2 / 2, loss times c."""
    z, theta = np.column_stack([x, np.ones(len(x))]), np.zeros(x.shape[1] + 1)
    weight = c * len(x) / (2 * np.where(labels, labels.sum(), (~labels).sum()))
    penalty = np.append(scale**2, 0)
    for _ in range(30):
        p = 1 / (1 + np.exp(-z @ theta))
        hessian = (z.T * (weight * p * (1 - p))) @ z + np.diag(penalty)
        theta -= np.linalg.solve(hessian, z.T @ (weight * (p - labels)) + penalty * theta)
    return theta


def test_the_compiled_loop_stops_at_the_largest_number_of_iterations():
    fits = TorchLbfgs(max_iter=3).fit(problem(**LARGE, cs=(10.0,)))
    assert not fits.converged.any()
    assert fits.n_iter.max() == 3


@pytest.mark.parametrize(
    ("function", "dtype", "error"), [("_sigmoid_float32", "f4", 2e-7), ("_sigmoid_float64", "f8", 1e-13)]
)
def test_the_logistic_function_of_the_compiled_loop(function, dtype, error):
    sigmoid = getattr(descent_kernels, function)
    margins = np.concatenate([np.linspace(-40, 40, 2001), [-1e30, -800, 800, 1e30]]).astype(dtype)
    expected = 1 / (1 + np.exp(-np.clip(margins.astype(np.float64), -700, 700)))
    assert np.abs([sigmoid(margin) for margin in margins] - expected).max() < error
    assert np.isnan(sigmoid(margins.dtype.type(np.nan)))


def test_side_by_side_fits_are_those_of_one_thread():
    """The compiled loop runs without the GIL: nothing of it is shared between threads."""
    tasks = [problem(seed=seed) for seed in range(4)]
    alone = [TorchLbfgs().fit(task) for task in tasks]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(TorchLbfgs().fit, tasks * 4))
    for i, fits in enumerate(together):
        assert fits.coef.equal(alone[i % 4].coef)


def test_a_short_float32_start_is_continued_in_float64(monkeypatch):
    task = problem(**LARGE, targets=2)
    expected = TorchLbfgs(tolerance=1e-9).fit(task)
    went, far = [], lbfgs._moved_too_far
    monkeypatch.setattr(lbfgs, "_FLOAT32_TOLERANCE", 0.3)
    monkeypatch.setattr(lbfgs, "_moved_too_far", lambda *thetas: went.append(far(*thetas)) or went[-1])
    fits = TorchLbfgs().fit(task)
    assert sum(map(len, went)) > 0, "some columns left the parabola"
    assert fits.converged.all()
    assert ((fits.coef - expected.coef).norm(dim=-1) / expected.coef.norm(dim=-1)).max() < 1e-5


@pytest.mark.parametrize("max_iter", [1, 4])
def test_a_stopped_float32_fit_warns(max_iter):
    fits = TorchLbfgs(max_iter=max_iter).fit(problem(**LARGE, noise=0.05))
    assert not fits.converged[-1].any()
    assert (fits.n_iter[-1] == max_iter).all()


def test_the_last_step_brings_coefficients_within_the_tolerance():
    task = problem(**LARGE, targets=4)
    found, expected = TorchLbfgs().fit(task), TorchLbfgs(tolerance=1e-9).fit(task)
    error = (found.coef - expected.coef).norm(dim=-1) / expected.coef.norm(dim=-1)
    assert found.converged.all()
    assert 1e-9 < error.max() < 5e-6


@pytest.mark.parametrize("inverted", [False, True])
def test_the_preconditioner_is_the_inverse_hessian(inverted):
    random = torch.Generator().manual_seed(0)
    z = torch.cat([torch.randn(700, 2 * torch_dense._PANEL + 9, generator=random), torch.ones(700, 1)], dim=1)
    weight, v = torch.rand(700, generator=random).double(), torch.randn(5, z.shape[1], generator=random)
    preconditioners = torch_dense.InverseHessians(z, inverted)
    preconditioners.at(0.1, weight)
    again = preconditioners.at(0.3, weight / 2)  # the Gram matrix is scaled, not recomputed
    penalty = torch.ones(z.shape[1], dtype=torch.float64)
    penalty[-1] = 0
    hessian = 0.15 * z.double().T @ (z.double() * weight[:, None]) + penalty.diag()
    torch.testing.assert_close(
        again.multiply(v).double(), torch.linalg.solve(hessian, v.double().T).T, rtol=1e-3, atol=1e-5
    )


def test_features_with_a_large_mean_lose_no_accuracy():
    task = problem(**LARGE, cs=(0.1,))
    x = task.x + 1e4 * task.x.std(dim=0) * torch.linspace(-1, 1, 96)
    task = ProbeProblem(x, task.labels, task.weight, task.scale, task.cs)
    assert disagreement(TorchLbfgs(), SklearnReference(), task) < 1e-4


def test_the_benchmark_measures_every_side():
    line = bench_probes.measure(400, 24, 2, (0.01, 1.0), rounds=1)
    assert max(line.error, line.cold_error, line.warm_error) < 1e-5
    assert min(line.ours, line.cold, line.warm, line.newton) > 0
    assert "| 400 x 24 | 2 x 5 x 2" in bench_probes.table([line])


def test_reference_is_scikit_learn_with_balanced_classes():
    task = problem(share=0.2, cs=(0.3,))
    train = (task.weight[1] > 0).numpy()
    scaled, label = (task.x / task.scale[1]).double().numpy()[train], task.labels[0].numpy()[train]
    direct = LogisticRegression(C=0.3, class_weight="balanced", solver="lbfgs", tol=1e-10, max_iter=10_000)
    direct.fit(scaled, label)
    fits = SklearnReference().fit(task)
    np.testing.assert_allclose(fits.coef[0, 0, 1] * task.scale[1].double(), direct.coef_[0], rtol=1e-4, atol=1e-6)
    score = task.x[train].double() @ fits.coef[0, 0, 1] + fits.intercept[0, 0, 1]
    np.testing.assert_allclose(score, direct.decision_function(scaled), rtol=1e-4, atol=1e-5)


def test_gradient_vanishes_where_float32_features_are_badly_scaled():
    task = problem(rows=400, d=12, cs=(1e-5, 1.0))
    task = ProbeProblem(task.x * 1e4 + 3e5, task.labels, task.weight, task.scale * 1e4, task.cs)
    fits = TorchLbfgs().fit(task)
    assert fits.converged.all()
    for i, c in enumerate(task.cs):
        w = (fits.coef[i, 0, 0] * task.scale[0]).requires_grad_()
        b = fits.intercept[i, 0, 0].clone().requires_grad_()
        f = (task.x.double() / task.scale[0].double()) @ w + b
        loss = torch.nn.functional.softplus(torch.where(task.labels[0], -f, f)) @ balanced(
            task.labels[0], task.weight[0]
        )
        (c * loss + w.square().sum() / 2).backward()
        assert w.grad is not None
        assert w.grad.norm() < 1e-4 * w.norm()


def test_chunks_of_columns_change_nothing():
    task = problem(targets=2)
    whole = TorchLbfgs().fit(task)
    chunked = TorchLbfgs(max_bytes=8 * torch_dense._TEMPORARIES * 300 * 2).fit(task)
    torch.testing.assert_close(chunked.coef, whole.coef, rtol=1e-4, atol=1e-9)
    assert chunked.converged.all()


def test_the_same_problem_gives_the_same_bits():
    assert torch.equal(TorchLbfgs().fit(problem()).coef, TorchLbfgs().fit(problem()).coef)


def test_constant_features_and_a_class_of_one_row():
    task = problem(rows=120, d=8)
    x = task.x.clone()
    x[:, 3] = 7.0
    scale = task.scale.clone()
    scale[:, 3] = 0
    labels = torch.zeros(1, 120, dtype=torch.bool)
    labels[0, 4] = True
    weight = torch.ones(1, 120)
    task = ProbeProblem(x, labels, weight, scale[:1], CS)
    fits = TorchLbfgs().fit(task)
    assert fits.converged.all()
    assert fits.coef[..., 3].abs().max() < 1e-9
    assert disagreement(TorchLbfgs(), SklearnReference(), task) < 1e-4


def test_features_without_any_variation_fit_at_once():
    task = ProbeProblem(torch.full((30, 4), 2.0), torch.arange(30)[None] < 9, torch.ones(2, 30), torch.zeros(2, 4), CS)
    fits = TorchLbfgs().fit(task)
    assert fits.converged.all()
    assert fits.coef.abs().max() < 1e-9
    assert (fits.coef.sum(-1) * 2 + fits.intercept).abs().max() < 1e-6  # balanced, so no class is preferred


def test_a_stopped_fit_warns():
    fits = TorchLbfgs(max_iter=2).fit(problem(noise=0.05))
    assert not fits.converged[-1].any()
    assert (fits.n_iter[-1] == 2).all()


def test_zero_targets_give_zero_fits():
    task = problem()
    none = ProbeProblem(task.x, task.labels[:0], task.weight, task.scale, CS)
    assert TorchLbfgs().fit(none).coef.shape == (4, 0, 3, 24)


def test_invalid_problems_are_rejected():
    good = problem()
    broken = good.x.clone()
    broken[5, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        ProbeProblem(broken, good.labels, good.weight, good.scale, CS)
    with pytest.raises(ValueError, match="ascending"):
        ProbeProblem(good.x, good.labels, good.weight, good.scale, (1.0, 0.1))
    with pytest.raises(ValueError, match="negative"):
        ProbeProblem(good.x, good.labels, -good.weight, good.scale, CS)
    with pytest.raises(ValueError, match="fit labels"):
        ProbeProblem(good.x[1:], good.labels, good.weight, good.scale, CS)
    one_class = ProbeProblem(good.x, torch.ones_like(good.labels), good.weight, good.scale, CS)
    with pytest.raises(ValueError, match="class"):
        TorchLbfgs().fit(one_class)


class FakeCuml:
    """A stand-in for cuML with the same objective by scikit-learn; it records its arguments."""

    def __init__(self) -> None:
        self.given: list[dict] = []
        self.output_types: list[str] = []

    def install(self, monkeypatch) -> None:
        fake = self

        class FakeLogisticRegression:
            def __init__(self, **settings) -> None:
                self.settings = settings

            def fit(self, features, labels, sample_weight):
                fake.given.append({**self.settings, "rows": len(features), "weight": sample_weight.copy()})
                c = self.settings["C"] * len(features) / sample_weight.sum()
                probe = LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(features, labels, sample_weight)
                self.coef_, self.intercept_, self.n_iter_ = probe.coef_, probe.intercept_, probe.n_iter_
                return self

        cuml, linear_model, cupy = (types.ModuleType(name) for name in ("cuml", "cuml.linear_model", "cupy"))
        cuml.set_global_output_type = self.output_types.append
        linear_model.LogisticRegression = FakeLogisticRegression
        cupy.from_dlpack = np.from_dlpack
        for module in (cuml, linear_model, cupy):
            module.__spec__ = ModuleSpec(module.__name__, loader=None)
            monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def cuml(monkeypatch) -> FakeCuml:
    fake = FakeCuml()
    fake.install(monkeypatch)
    return fake


def test_the_call_of_cuml(cuml):
    task = problem(weighted=True, share=0.2, cs=(0.01, 1.0))
    backend = CumlQn(torch.device("cpu"))
    assert disagreement(backend, SklearnReference(), task) < 1e-3
    assert cuml.output_types == ["cupy"]
    first = cuml.given[0]
    assert first["rows"] == 200  # held-out rows are not transferred
    assert first["weight"].mean() == pytest.approx(1)
    train = task.weight[0] > 0
    assert first["C"] == pytest.approx(0.01 * task.weight[0][train].mean())
    assert first["tol"] == pytest.approx(backend.tolerance / 200)
    settings = {key: first[key] for key in ("penalty", "fit_intercept", "class_weight", "solver", "max_iter")}
    assert settings == {
        "penalty": "l2",
        "fit_intercept": True,
        "class_weight": None,
        "solver": "qn",
        "max_iter": backend.max_iter,
    }


def test_cumls_settings_are_made_once_in_each_thread(cuml):
    import threading

    backend, task = CumlQn(torch.device("cpu")), problem(cs=(0.1,))
    backend.fit(task)
    backend.fit(task)
    assert cuml.output_types == ["cupy"]
    thread = threading.Thread(target=backend.fit, args=(task,))
    thread.start()
    thread.join()
    assert cuml.output_types == ["cupy", "cupy"]


def test_a_stopped_cuml_fit_warns(cuml):
    fits = CumlQn(torch.device("cpu"), max_iter=1).fit(problem(cs=(1.0,)))
    assert not fits.converged.any()


def sparse_problem(
    rows=400, d=2000, k=12, targets=2, cs=(1e-5, 1e-3, 1e-1, 10.0), scale=None, weighted=False, seed=0
) -> ProbeProblem:
    """Return CSR codes of k latents per row, a few frequent and most rare, some entries twice; three splits."""
    random = torch.Generator().manual_seed(seed)
    often = torch.arange(1, d + 1).float() ** -0.7
    col = torch.multinomial(often.expand(rows, d), k, generator=random)
    col = torch.cat([col, col[:, :1]], dim=1)  # the first latent of each row twice
    value = 0.2 + 3 * torch.rand(rows, k + 1, generator=random)
    crow = torch.arange(0, rows * (k + 1) + 1, k + 1)
    x = torch.sparse_csr_tensor(crow, col.flatten(), value.flatten(), (rows, d))
    signal = x @ (torch.randn(d, targets, generator=random) * (torch.rand(d, targets, generator=random) < 0.1))
    signal = (signal - signal.mean(dim=0)) / signal.std(dim=0) + 0.5 * torch.randn(rows, targets, generator=random)
    weight = torch.ones(3, rows, dtype=torch.float64)
    if weighted:
        weight = (1 / torch.randint(1, 5, (rows,), generator=random).double()).expand(3, rows).clone()
    for split in range(3):
        weight[split, split::3] = 0
    scale = torch.ones(1, 1).expand(3, d) if scale is None else scale
    return ProbeProblem(x, (signal > signal.quantile(0.6, dim=0)).T, weight, scale, cs)


@pytest.fixture
def no_densifying(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("rows x d was made dense")

    monkeypatch.setattr(torch.Tensor, "to_dense", refuse)


SPARSE = {
    "wide": {},
    "fewer latents than rows": {"rows": 600, "d": 150},
    "weighted rows": {"weighted": True},
    "a scale for each split": {"scale": 0.5 + torch.rand(3, 2000, generator=torch.Generator().manual_seed(5))},
    "beyond the exact part of the preconditioner": {"rows": 500, "d": 6000, "k": 30, "targets": 1},
}


@pytest.mark.parametrize("case", SPARSE.values(), ids=SPARSE.keys())
def test_torch_agrees_with_scikit_learn_on_sparse_codes(case, no_densifying):
    task = sparse_problem(**case)
    ours, reference = TorchLbfgs().fit(task), SklearnReference().fit(task)
    assert ours.converged.all()
    assert reference.converged.all()
    error = (ours.coef - reference.coef).norm(dim=-1) / reference.coef.norm(dim=-1)
    assert error.max() < 1e-4
    torch.testing.assert_close(ours.intercept, reference.intercept, rtol=1e-4, atol=1e-4)


def test_sparse_and_strided_features_give_the_same_probes():
    sparse = sparse_problem(rows=200, d=60, k=8, weighted=True)
    strided = ProbeProblem(sparse.x.to_dense(), sparse.labels, sparse.weight, sparse.scale, sparse.cs)
    a, b = TorchLbfgs().fit(sparse), TorchLbfgs().fit(strided)
    assert ((a.coef - b.coef).norm(dim=-1) / b.coef.norm(dim=-1)).max() < 1e-4
    torch.testing.assert_close(a.intercept, b.intercept, rtol=1e-4, atol=1e-5)


def test_latents_that_never_fire_have_zero_weight():
    task = sparse_problem(rows=200, d=60, k=8, cs=(0.1,))
    crow, col, value = task.x.crow_indices(), task.x.col_indices(), task.x.values()
    n = int(crow[1])
    col, value = col.clone(), value.clone()
    col[0], value[0] = 77, 2.0  # only row 0, which split 0 holds out
    col[n], col[n + 1], value[n], value[n + 1] = 88, 88, 1.5, -1.5  # row 1; the sum is 0
    x = torch.sparse_csr_tensor(crow, col, value, (200, 100))
    task = ProbeProblem(x, task.labels, task.weight, torch.ones(3, 100), task.cs)
    ours, reference = TorchLbfgs().fit(task), SklearnReference().fit(task)
    dead = torch.ones(100, dtype=torch.bool)
    dead[:60], dead[77] = False, False
    assert (ours.coef[..., dead] == 0).all()
    assert ours.coef[0, 0, 0, 77].abs() < 1e-6, "no training row of this split has it"
    assert ours.coef[0, 0, 1, 77].abs() > 1e-4
    torch.testing.assert_close(ours.coef[..., 77], reference.coef[..., 77], rtol=1e-4, atol=1e-6)


def test_codes_without_any_latent_fit_at_once():
    x = torch.sparse_csr_tensor(torch.zeros(31, dtype=torch.int64), torch.empty(0, dtype=torch.int64), [], (30, 5))
    fits = TorchLbfgs().fit(
        ProbeProblem(x.float(), torch.arange(30)[None] < 9, torch.ones(2, 30), torch.ones(2, 5), CS)
    )
    assert fits.converged.all()
    assert (fits.coef == 0).all()
    assert fits.intercept.abs().max() < 1e-9


def test_chunks_of_sparse_columns_change_nothing():
    task = sparse_problem(rows=120, d=300)
    whole, chunked = TorchLbfgs().fit(task), TorchLbfgs(max_bytes=1).fit(task)
    assert ((chunked.coef - whole.coef).norm(dim=-1) / whole.coef.norm(dim=-1)).max() < 1e-4
    assert chunked.converged.all()


def test_a_sparse_fit_that_was_stopped_says_so():
    fits = TorchLbfgs(max_iter=2).fit(sparse_problem())
    assert not fits.converged[-1].any()
    assert (fits.n_iter[-1] == 2).all()


def test_sparse_codes_with_nan_are_refused():
    task = sparse_problem(rows=60, d=80)
    task.x.values()[7] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        ProbeProblem(task.x, task.labels, task.weight, task.scale, task.cs)


def test_cuml_leaves_sparse_codes_to_torch(cuml):
    task = sparse_problem(rows=120, d=300)
    fits = CumlQn(torch.device("cpu")).fit(task)
    assert torch.equal(fits.coef, TorchLbfgs().fit(task).coef)
    assert cuml.given == []


@pytest.mark.gpu
def test_sparse_codes_on_a_gpu_give_the_same_probes():
    task = sparse_problem(rows=500, d=6000, k=30)
    there = ProbeProblem(task.x.cuda(), task.labels.cuda(), task.weight.cuda(), task.scale.cuda(), task.cs)
    a, b = TorchLbfgs().fit(there), TorchLbfgs().fit(task)
    assert a.converged.all()
    assert ((a.coef.cpu() - b.coef).norm(dim=-1) / b.coef.norm(dim=-1)).max() < 1e-4


@pytest.mark.parametrize(("name", "solver"), [("auto", "torch"), ("torch", "torch"), ("sklearn", "sklearn")])
def test_the_choice_of_a_backend_on_the_cpu(name, solver):
    backend, reason = choose_backend(name, "cpu")
    assert backend.name == solver
    assert reason


def test_impossible_backends_are_rejected(monkeypatch):
    with pytest.raises(RequestError, match="choose one of auto, torch, cuml, sklearn"):
        choose_backend("svm", "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"delta-selectivity\[gpu\]"):
        choose_backend("cuml", "cuda:0")
    backend, reason = choose_backend("auto", "cuda:0")
    assert (backend.name, reason) == ("torch", "cuML is not installed")


def test_cuml_needs_a_gpu(cuml):
    with pytest.raises(RequestError, match="not on cpu"):
        choose_backend("cuml", "cpu")
    assert choose_backend("cuml", "cuda:0")[0].name == "cuml"


@pytest.mark.parametrize(
    ("difference", "solver", "why"), [(1e-5, "cuml", "agrees"), (0.1, "torch", "differs"), (None, "torch", "failed")]
)
def test_auto_uses_cuml_only_if_it_agrees(cuml, monkeypatch, difference, solver, why):
    def check(backend, reference, task):
        if difference is None:
            raise RuntimeError("no driver")
        return difference

    monkeypatch.setattr("delta_selectivity.probing.probes.disagreement", check)
    monkeypatch.setattr("delta_selectivity.probing.probes._small_problem", lambda device: None)
    backend, reason = choose_backend("auto", "cuda:0")
    assert backend.name == solver
    assert why in reason
