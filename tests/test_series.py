"""Checkpoints of a training as a series: steps in names, paired changes, the last better one, and the plot."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import D_MODEL, _write_sparsify_layer, people, write_csv
from result_sets import write_set
from test_html_report import Tree
from transformers import AutoModelForCausalLM

import delta_selectivity as ds
from delta_selectivity.cli import report
from delta_selectivity.reporting.series import series_of, step_of
from delta_selectivity.reporting.study import study_of

FAST = ds.Settings(folds=3, repeats=5, whole_tokens=500)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("runs/a/step_100", ("runs/a/*", 100)),
        ("runs/a/checkpoint-2000/layers.3", ("runs/a/*/layers.3", 2000)),
        ("checkpoints/abc/4096000", ("checkpoints/abc/*", 4096000)),
        ("checkpoints/abc/final_8192000", ("checkpoints/abc/*", 8192000)),
        ("step143000", ("*", 143000)),
        ("topk_step=7", ("topk_*", 7)),
        ("sae-k32", None),
        ("tokens_500M/step_1k", None),
        ("batchtopk_32", None),
        ("sae-pythia-160m-32k", None),
        ("a/layer_3", None),
        ("v2", None),
    ],
)
def test_the_step_is_read_from_the_name(name, expected):
    assert step_of(name) == expected


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """Return an SAE that improves until step 300, and is then only perturbed."""
    folder = tmp_path_factory.mktemp("series")
    task = write_csv(folder / "people.csv", people(900))
    generator = torch.Generator().manual_seed(0)
    directions = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])  # keeps the largest k coordinates
    for step, k in ((100, 8), (200, 14), (300, 24), (1000, 24)):
        stirred = directions + 1e-4 * (step == 1000) * torch.randn(directions.shape, generator=generator)
        _write_sparsify_layer(folder / "run" / f"step_{step}" / "layers.1", stirred, k)
    names = [str(folder / "run" / f"step_{step}") for step in (1000, 100, 300, 200)]
    return ds.evaluate(tiny_model, names, task, layers=1, settings=FAST, device="cpu")


def test_a_series_has_the_paired_differences_of_compare(trained):
    frame = trained.series()
    assert list(frame.step) == [100, 200, 300, 1000]
    assert frame.series.nunique() == 1
    assert frame.series[0].endswith("run/*")
    saes = list(frame.sae)
    assert frame.change.isna().tolist() == [True, False, False, False]
    for before, sae, (_, line) in zip(saes, saes[1:], list(frame.iterrows())[1:], strict=False):
        found = trained.compare(sae, before).transfer_r2
        assert [line.change, line.change_ci_low, line.change_ci_high, line.change_p_value] == pytest.approx(
            [found.value, found.low, found.high, found.p_value]
        )
        assert line.surely_better == (found.low > 0)
    for _, line in frame.iterrows():
        (level,) = {tuple(f["_run"]["sae_level"][f"transfer_r2{end}"] for end in ("", "_ci_low", "_ci_high"))
                    for _, f in trained.files if f["_run"]["config"]["sae"] == line.sae}  # fmt: skip
        assert (line.transfer_r2, line.transfer_r2_ci_low, line.transfer_r2_ci_high) == level
    assert frame.surely_better.tolist() == [False, True, True, False]
    assert frame.attrs["last_better"] == {frame.series[0]: 300}


def test_the_page_shows_and_draws_the_series(trained, tmp_path):
    path = trained.report(tmp_path / "report.html")
    root = Tree(path.read_text("utf-8")).root
    (section,) = (node for node in root.all("section") if node.attributes["id"] == "series")
    assert "4 checkpoints of " in section.text
    assert "the last one that is surely better than the previous one is step 300 (by 0." in section.text
    (figure,) = section.all("figure")
    told = [title.text for title in figure.all("title")]
    assert sum("minus the previous" in line for line in told) == 3
    frame = trained.series()
    for step, value in zip(frame.step, frame.transfer_r2, strict=True):
        assert any(line.startswith(f"step {step:,}: {value:.4f}".replace("-", "−")) for line in told)


def test_the_page_omits_an_empty_series_section(tmp_path):
    folder = write_set(tmp_path / "in", saes=("a/k8", "a/k32"))
    assert ds.Results.load(folder).series().empty
    assert report.main([str(folder), "-o", str(tmp_path / "report.html")]) == 0
    assert 'id="series"' not in (tmp_path / "report.html").read_text("utf-8")


def test_a_series_without_scores_has_no_changes(tmp_path):
    folder = write_set(tmp_path / "in", saes=("a/step_1", "a/step_20"))
    changed = ds.Results.load(folder)
    for _, found in changed.files:
        found["_run"]["sae_level"]["compared"] = {}
    (series,) = series_of(study_of(changed.files))
    assert series.last_better is None
    assert "cannot be compared" in series.sentence()


def test_revisions_of_one_model_are_a_series_compared_on_the_same_rows(tiny_model, tiny_saes, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    task = write_csv(tmp_path / "people.csv", people(900))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for number, revision in enumerate(("step1", "step10")):
        commit = f"{number}" * 40
        shutil.copytree(tiny_model, repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
        model.gpt_neox.embed_in.weight.data.mul_(1 + number)
        model.save_pretrained(repository / "snapshots" / commit)
        settings = ds.Settings(folds=3, repeats=2, whole_tokens=500, revision=revision)
        ds.evaluate("owner/tiny", tiny_saes, task, layers=0, settings=settings, device="cpu",
                    output=tmp_path / "out" / revision)  # fmt: skip
    results = ds.Results.load(tmp_path / "out" / "step1", tmp_path / "out" / "step10")
    frame = results.series()
    assert list(frame.step) == [1, 10]
    assert frame.series[0].endswith("at owner/tiny, revision *")
    means = frame.transfer_r2.tolist()
    assert frame.change[1] == pytest.approx(means[1] - means[0], abs=1e-9), "one cell: the mean of the differences"
    assert frame.change_ci_low[1] < frame.change[1] < frame.change_ci_high[1]
