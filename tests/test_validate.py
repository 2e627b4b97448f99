"""The validation as users run it, and that it detects planted errors of the metric."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from delta_selectivity.probing import uncertainty
from delta_selectivity.probing.backends.torch_lbfgs import TorchLbfgs
from delta_selectivity.probing.folds import FoldPlan
from validation import coverage, document, plants, suite, table
from validation.world import GaussianWorld

ROOT = Path(__file__).resolve().parent.parent
SMALL = coverage.Setting("small", GaussianWorld(200, (1, 1), 8, (0.5,)))
CROWDED = coverage.Setting("crowded", GaussianWorld(60, (5, 10), 16, (0.5,), person_share=0.5))
PLANTS = (
    "identity",
    "concept erased, LEACE",
    "concept erased, true direction",
    "lossless rotation",
    "noise ladder",
    "PCA of rank",
    "random TopK SAE",
    "decoder rows permuted",
    "known truth",
    "equal views",
    "null labels",
    "5 seeds, 3000 rows",
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("validate", ROOT / "scripts" / "validate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(1200)  # under two minutes on an idle machine
def test_the_quick_mode_passes():
    done = subprocess.run([sys.executable, "-m", "scripts.validate"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    for plant in PLANTS:
        assert plant in done.stdout, plant


def rates(setting: coverage.Setting, repeats: int, seed: int, workers: int = 1) -> coverage.Rates:
    (found,) = coverage.measure_settings([setting], repeats, seed, workers)
    return found


def failed(rows: list[table.Row]) -> set[str]:
    return {f"{row.plant}: {row.figure}" for row in table.failures(rows)}


def test_a_right_metric_passes_in_a_small_setting():
    assert failed(rates(SMALL, 40, seed=1).rows()) == set()


def test_too_narrow_intervals_fail(monkeypatch):
    whole = uncertainty.Estimate.interval

    def half(self, confidence):
        low, high = whole(self, confidence)
        return (self.value + low) / 2, (self.value + high) / 2

    monkeypatch.setattr(uncertainty.Estimate, "interval", half)
    assert failed(rates(SMALL, 40, seed=1).rows()) == {"known truth: 95 % intervals that cover it"}


def test_people_in_training_and_test_fail(monkeypatch):
    build = FoldPlan.build

    def by_row(labels, groups, weights, n_folds, n_repeats, seed):
        plan = build(labels, np.arange(len(groups)), weights, n_folds, n_repeats, seed)
        return replace(plan, groups=np.asarray(groups))

    assert "null labels: mean sel" not in failed(rates(CROWDED, 20, seed=0).rows())
    monkeypatch.setattr(coverage.FoldPlan, "build", by_row)
    assert "null labels: mean sel" in failed(rates(CROWDED, 20, seed=0).rows())


def test_probing_latents_instead_of_the_reconstruction_fails(monkeypatch):
    """A common error: the codes are probed, whatever the decoder does with them."""
    ground = _sparse_ground()
    assert failed(plants.shuffled_decoder(ground, suite.MOST_LEFT)) == set()
    found = plants.Bench.found
    intact = ground.saes["exact"]

    def by_latents(bench, recon, latents=None):
        return found(bench, intact.decode(intact.encode(bench.rows.x)), latents)

    monkeypatch.setattr(plants.Bench, "found", by_latents)
    assert "decoder rows permuted: highest transfer_sel" in failed(plants.shuffled_decoder(ground, suite.MOST_LEFT))


def test_a_metric_without_refitting_fails(monkeypatch):
    """With transfer instead of delta, a rotation would count as a loss."""
    world = GaussianWorld(500, (1, 1), 16, (1.5,))
    rows = world.sample(np.random.default_rng(0))
    ground = plants.Ground("small", [plants.Bench(rows, TorchLbfgs())], {}, {})
    assert failed(plants.rotation(ground)) == set()
    results = plants.Bench.results

    def transferred(bench, recon, latents=None):
        return [(task, replace(r, delta_sel=r.transfer_delta)) for task, r in results(bench, recon, latents)]

    monkeypatch.setattr(plants.Bench, "results", transferred)
    assert failed(plants.rotation(ground)) == {"lossless rotation: largest abs(delta_sel)"}


def _sparse_ground() -> plants.Ground:
    world = replace(suite.SPARSE, people=600)
    rows = world.sample(np.random.default_rng(0))
    return plants.Ground("sparse", [plants.Bench(rows, TorchLbfgs())], {}, world.saes({"exact": 0.0}))


def test_the_closed_form_is_the_balanced_accuracy_of_many_people():
    world = GaussianWorld(200_000, (1, 1), 6, (0.8,), seed=3)
    rows = world.sample(np.random.default_rng(0))
    random = np.random.default_rng(1)
    coef, intercept = random.normal(size=6) + 2 * world.means[0] @ world.mixing, 0.4
    noisy = rows.x + torch.from_numpy(random.normal(size=rows.x.shape).astype(np.float32))
    right = (noisy.numpy() @ coef + intercept > 0) == rows.labels[0]
    counted = np.mean([right[rows.labels[0] == side].mean() for side in (False, True)])
    assert world.balanced_accuracy(coef, np.array(intercept), 1.0) == pytest.approx(counted, abs=0.004)


def test_ablating_a_direction_does_not_change_others():
    world = GaussianWorld(4000, (1, 1), 12, (1.0, 1.5), decay=1.0)
    rows = world.sample(np.random.default_rng(0))
    white = world.without(0, rows.x).double().numpy() @ np.linalg.inv(world.mixing)
    before = rows.x.double().numpy() @ np.linalg.inv(world.mixing)
    gone, kept = world.means / np.linalg.norm(world.means, axis=1, keepdims=True)
    assert np.abs(white @ gone).max() < 1e-4
    np.testing.assert_allclose(white @ kept, before @ kept, atol=1e-4)


def test_a_persons_rows_share_their_noise():
    world = GaussianWorld(3000, (2, 2), 4, (0.0,), person_share=0.6)
    noise = world.noise(np.random.default_rng(0), np.repeat(np.arange(3000), 2))
    assert np.corrcoef(noise[::2].ravel(), noise[1::2].ravel())[0, 1] == pytest.approx(0.6, abs=0.03)
    assert noise.var() == pytest.approx(1, abs=0.03)


def test_repeats_do_not_depend_on_the_number_of_processes():
    assert rates(SMALL, 6, 3, workers=1) == rates(SMALL, 6, 3, workers=2)


def test_fewer_repeats_widen_the_required_range():
    found = rates(SMALL, 4, 0)
    required = {n: replace(found, repeats=n).rows()[1].required for n in (60, 500, 2000)}
    assert required[500] == required[2000] == "0.93 to 0.985"
    assert required[60] != required[500]


def test_nan_and_values_out_of_range_fail():
    assert table.judged("here", "plant", "figure", float("nan"), low=0).passed is False
    assert table.judged("here", "plant", "figure", 0.1, high=0.1).passed is True
    assert table.judged("here", "plant", "figure", 1e-9, 0, 0).passed is False
    assert table.reported("here", "plant", "figure", 9.0).passed is None


@pytest.mark.parametrize(("measured", "code"), [(0.0, 0), (0.1, 1)])
def test_failures_set_the_exit_code_and_are_in_the_document(script, monkeypatch, tmp_path, capsys, measured, code):
    row = table.judged("synthetic", "identity", "largest abs(delta_sel)", measured, 0, 0)
    asked = []
    monkeypatch.setattr(suite, "validate", lambda *given: asked.append(given) or [row])
    monkeypatch.setattr(script, "PROJECT", tmp_path)
    (tmp_path / "docs").mkdir()
    assert script.main(["--full", "--repeats", "7", "--workers", "1", "--write"]) == code
    assert (asked[0][0].repeats, asked[0][0].settings) == (7, suite.FULL.settings)
    assert ("FAIL" in capsys.readouterr().out) == bool(code)
    written = (tmp_path / "docs" / "validation.md").read_text(encoding="utf-8")
    assert table.as_text([row]) in written
    assert f"**{1 - code} of 1 required figures are met.**" in written
    assert document.TRUTH in written


def test_rows_of_some_settings_replace_those_of_the_document(tmp_path):
    path = tmp_path / "validation.md"
    scale = replace(suite.PEOPLE, settings=(SMALL,))
    old, other = table.judged("small (9 repeats)", "p", "f", 2.0, high=1), table.judged("else", "p", "f", 0.5, high=1)
    document.write(path, [old, other], scale, 0, 1.0)
    assert "**1 of 2 required figures are met.**" in path.read_text("utf-8")
    new = table.judged("small (7 repeats)", "p", "f", 0.0, high=1)
    document.replace_settings(path, [new], scale, 0, 1.0)
    text = path.read_text("utf-8")
    assert table.read(text) == [other, new]
    assert "**2 of 2 required figures are met.**" in text


@pytest.mark.parametrize(("only_model", "only_sae"), [(0, 0), (4, 4), (3, 9), (40, 21)])
def test_mcnemars_test_equals_scipys_binomial_test(monkeypatch, only_model, only_sae):
    right = np.repeat([[1, 0], [0, 1], [1, 1], [0, 0]], [only_model, only_sae, 5, 7], axis=0).astype(bool)
    of_view = {"model": [right[:, 0]], "sae": [right[:, 1]]}
    monkeypatch.setattr(coverage, "correct", lambda scores, view: of_view[view])
    n = only_model + only_sae
    expected = binomtest(only_sae, n).pvalue if n else 1
    assert coverage.mcnemar(SimpleNamespace(probe=lambda index: None)) == pytest.approx(expected)
