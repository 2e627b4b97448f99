"""Plots by layer: every number is that of the files, and significant differences of two SAEs agree with plain sums."""

from __future__ import annotations

import json

import numpy as np
import pytest
from result_sets import write_set
from scipy import stats
from test_html_report import lines, plots_in, study_in

from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.records import scores
from delta_selectivity.records.scores import LayerScores
from delta_selectivity.reporting import depth
from delta_selectivity.reporting.results import result_files

N = 400
LAYERS = range(4)


def stored(sae, layer):
    """Return scores of people with one row each; the second SAE is much worse in layers 1 and 2, else equal."""
    random = np.random.default_rng([layer])
    labels = np.arange(N) % 2 == 0
    truth = np.where(labels, 1.0, -1.0)
    model = truth + 0.7 * random.normal(size=(2, N))
    worse = sae == 1 and layer in (1, 2)
    own = np.where(np.arange(N) % 3 == 0, -model, model) if worse else model
    views = {name: values.astype(np.float16) for name, values in (("model", model), ("sae", own), ("transfer", own))}
    folds = np.stack([np.arange(N) % 5, (np.arange(N) // 2) % 5]).astype(np.int8)
    return ProbeScores(views, labels, np.arange(N, dtype=np.int64), np.ones(N), folds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = write_set(tmp_path_factory.mktemp("depth"), saes=("a/one", "b/two"), layers=LAYERS)
    for number, path in enumerate(result_files(target)):
        key = scores.key_digest(json.loads(path.read_text())["_run"]["key"])
        for layer in LAYERS[:3]:
            scores.save(scores.path_of(path, layer), LayerScores(layer, key, {"gender": stored(number, layer)}))
    return target


def test_curves_by_layer_have_the_numbers_of_the_file(folder):
    study = study_in(folder)
    found = lines(plots_in(folder)["depth_a_one"])
    assert [int(line["layer"]) for line in found] == list(LAYERS)
    for line, cell in zip(found, study.saes[0].cells, strict=True):
        for key in ("model_sel", "sae_sel", "transfer_sel"):
            assert float(line[key]) == cell.result[key]
        assert line["verdict"] == cell.verdict


def test_significant_paired_differences_are_shaded(folder):
    plot = plots_in(folder)["by_layer_a_one_b_two"]
    found = {int(line["layer"]): line for line in lines(plot)}
    assert set(found) == {0, 1, 2}, "the layers whose scores are there"
    p_values = []
    for layer, line in found.items():
        right = [((stored(sae, layer).views["sae"] > 0) == stored(sae, layer).labels).mean(axis=0) for sae in (0, 1)]
        change = right[0] - right[1]
        assert float(line["difference"]) == pytest.approx(change.mean(), abs=1e-12)  # both classes have the same size
        spread = change.std()
        z = abs(change.mean()) / (spread / np.sqrt(N)) if spread else 0.0
        p_values.append(2 * stats.norm.sf(z))
    q_values = stats.false_discovery_control(p_values)
    assert [float(found[layer]["q_value"]) < 0.05 for layer in found] == [bool(q < 0.05) for q in q_values]
    assert [bool(q < 0.05) for q in q_values] == [False, True, True]
    assert "The 2 shaded cells" in plot.description
    (axes,) = plot.draw().figure.axes
    assert len(axes.collections) == 3, "a bar at each of the two layers, and the area between them"


def test_saes_without_scores_have_no_overlay(tmp_path):
    plots = plots_in(write_set(tmp_path / "in", saes=("a/one", "b/two"), layers=LAYERS))
    assert not [name for name in plots if name.startswith("by_layer")]
    assert {name for name in plots if name.startswith("depth")} == {"depth_a_one", "depth_b_two"}


def test_only_the_first_of_many_saes_have_a_plot(tmp_path):
    names = [f"org/sae-{number}" for number in range(depth.MAX_SAES + 2)]
    plots = plots_in(write_set(tmp_path / "in", saes=names, layers=[3]))
    assert sum(name.startswith("depth") for name in plots) == depth.MAX_SAES
