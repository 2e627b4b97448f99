"""SAEBench's format: our files are valid for its classes, and its files are compared with ours.

`tests/saebench` has the fields of its classes and a file of each, both made by the classes (`tests/saebench/make.py`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from result_sets import write_changed, write_set
from test_forged_results import NAMES, at, forge
from test_html_report import page_of

from delta_selectivity.cli import report
from delta_selectivity.errors import RequestError
from delta_selectivity.records import saebench
from delta_selectivity.reporting.results import load_all, result_files
from delta_selectivity.reporting.saebench import caveats, own_evaluations

HERE = Path(__file__).resolve().parent / "saebench"
FIELDS = json.loads((HERE / "fields.json").read_text())
THEIRS = [HERE / f"{kind}_eval_results.json" for kind in ("core", "sparse_probing")]
FEW = {f"k{k}_{end}": value for k in (1, 2, 5, 16) for end, value in
       (("sel", 0.6 + k / 100), ("ci_low", 0.55), ("ci_high", 0.85), ("auc", 0.7))}  # fmt: skip
RUN_ON = {"ce_model": 3.0, "ce_sae": 3.5, "ce_mean": 9.0, "ce_zero": 13.0, "kl_sae": 0.5, "kl_zero": 10.0,
          "kl_mean": 6.0, "n_tokens_run": 700, "fvu_whole": 0.25, "dead": 0.125, "cosine": 0.9, "l1": 20.0,
          "n_tokens": 1000}  # fmt: skip


def measured(cells):
    return {**{name: {**cell, **FEW} for name, cell in cells.items()}, **RUN_ON}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(
        tmp_path_factory.mktemp("in"), saes=("a/one", "b/two"), layers=[3, 4], datasets=("gender", "is_alive"),
        baselines=[("identity", None)], edit=measured,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return little to draw: one layer of an SAE."""
    return write_set(tmp_path_factory.mktemp("small"), layers=[4], edit=measured)


@pytest.fixture(scope="module")
def written(folder):
    out = folder.parent / "saebench"
    assert report.main([str(folder), "--saebench", str(out)]) == 0
    return {path.relative_to(out): json.loads(path.read_text()) for path in out.rglob("*.json")}


def test_written_files_have_the_fields_of_saebench(written):
    assert len(written) == 2 * 2 * 3, "two evaluations, two layers, two SAEs and a baseline"
    for path, content in written.items():
        faults = [error.message for error in Draft202012Validator(FIELDS[path.parent.name]).iter_errors(content)]
        assert faults == []
    wrong = dict(next(content for path, content in written.items() if path.parent.name == "core"))
    del wrong["eval_result_metrics"]
    assert list(Draft202012Validator(FIELDS["core"]).iter_errors(wrong))


def test_saes_with_the_same_name_have_separate_files(small, tmp_path):
    """The same SAE with another seed is another line of every table."""
    path = next(small.rglob("*.json"))
    write_changed(path, small.parent / "seed_1" / path.name, key={"seed": 1})
    out = tmp_path / "out"
    assert report.main([str(small), str(small.parent / "seed_1"), "--saebench", str(out)]) == 0
    contents = [json.loads(path.read_text()) for path in (out / "core").iterdir()]
    assert len({content["sae_lens_release_id"] for content in contents}) == len(contents) == 2


def test_core_holds_the_means_of_a_layer_over_its_datasets(written):
    (content,) = (found for path, found in written.items() if path.match("core/*one_layers.3*"))
    metrics = content["eval_result_metrics"]
    assert metrics["model_performance_preservation"] == {
        "ce_loss_score": pytest.approx(0.95), "ce_loss_with_ablation": 13.0, "ce_loss_with_sae": 3.5,
        "ce_loss_without_sae": 3.0,
    }  # fmt: skip
    assert metrics["model_behavior_preservation"]["kl_div_score"] == pytest.approx(0.95)
    assert metrics["reconstruction_quality"]["explained_variance"] == 0.75
    assert metrics["reconstruction_quality"]["mse"] == metrics["shrinkage"]["l2_ratio"] == -1
    assert metrics["misc_metrics"]["frac_alive"] == 0.875
    assert metrics["token_stats"]["total_tokens_eval_reconstruction"] == 1400
    assert content["eval_result_unstructured"]["delta_selectivity"]["gender"]["ce_mean"] == 9.0


def test_sparse_probing_has_a_detail_a_task_with_its_interval(written, folder):
    (content,) = (found for path, found in written.items() if path.match("sparse_probing/*one_layers.4*"))
    details = {one["dataset_name"]: one for one in content["eval_result_details"]}
    files, _ = load_all(result_files(folder))
    own = {path.stem: found["layer_4"] for path, found in files if found["_run"]["config"]["sae"] == "a/one"}
    assert len(details) == len(own) == 2
    for name, cell in ((name, next(r for r in layer.values() if isinstance(r, dict))) for name, layer in own.items()):
        detail = details[next(known for known in details if known in name)]
        assert detail["llm_test_accuracy"] == cell["model_sel"]
        assert detail["llm_test_accuracy_ci_low"] == cell["model_ci_low"]
        assert (detail["sae_top_5_test_accuracy"], detail["sae_top_5_test_auc"]) == (0.65, 0.7)
        assert (detail["sae_top_5_test_accuracy_ci_low"], detail["sae_top_5_test_accuracy_ci_high"]) == (0.55, 0.85)
        assert detail["sae_top_16_test_accuracy"] == 0.76
    assert content["eval_result_metrics"]["sae"]["sae_top_2_test_accuracy"] == pytest.approx(0.62)
    assert "sae_top_16_test_accuracy" not in content["eval_result_metrics"]["sae"]


def test_written_files_are_read_back(written):
    for path, content in written.items():
        found = saebench.evaluation(content, path.stem)
        assert found.is_ours
        assert (found.eval_type, found.layer in (3, 4)) == (path.parent.name, True)
        assert not any(value == -1 for value in found.metrics.values())


def test_files_of_saebench_are_read():
    core, probing = (saebench.read(path) for path in THEIRS)
    assert (core.sae, core.model, core.layer, core.is_ours) == (
        "some_release/blocks.4.hook_resid_post__trainer_0", "pythia-160m-deduped", 4, False
    )  # fmt: skip
    assert (core.metrics["ce_loss_score"], core.metrics["l0"]) == (0.985, 79.5)
    assert probing.metrics["sae_top_1_test_accuracy"] == 0.71
    assert set(probing.tasks) == {"LabHC/bias_in_bios_class_set1", "gender"}


def test_saebench_results_are_in_tables_page_and_plots(folder, small, tmp_path, capsys):
    asked = [str(folder), "--beside", *map(str, THEIRS)]
    assert report.main(asked) == 0
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    assert [line[1] for line in lines] == ["measured by", "this program", "this program", "SAEBench"] * 2
    assert lines[1][-3:] == ["0.610", "0.620", "0.650"], "layer 4 alone: theirs is of no other"
    assert lines[3][-3:] == ["0.710", "0.760", "0.810"]
    assert "The models differ" in out
    drawn = ["--plots", str(tmp_path / "plots"), "-o", str(tmp_path / "r.html")]
    assert report.main([str(small), *asked[1:], *drawn]) == 0
    drawn = (tmp_path / "plots" / "saebench_few_latents.csv").read_text().splitlines()
    assert drawn[0] == "sae,measured_by,layer,k,accuracy"
    assert len(drawn) == 1 + 2 * 3
    assert (tmp_path / "plots" / "saebench_core.png").stat().st_size > 1000
    page = (tmp_path / "r.html").read_text()
    assert page.count("Comparison with SAEBench") == 2, "a link and a section"
    page_of(small, tmp_path / "without.html")
    assert "SAEBench" not in (tmp_path / "without.html").read_text()


def test_caveats_of_the_comparison_are_shown(folder):
    own, theirs = own_evaluations(load_all(result_files(folder))[0]), [saebench.read(path) for path in THEIRS]
    said = " ".join(caveats(own, theirs))
    for part in (
        "The models differ",
        "Tasks with the same name in both: gender",
        "one test split",
        "OpenWebText",
        "zeros",
    ):
        assert part in said
    assert "The layers differ" not in said
    assert "OpenWebText" not in " ".join(caveats(own, theirs[1:]))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no object"),
        ('{"eval_type_id": "absorption_first_letter"}', "is not supported; supported: core, sparse_probing"),
        ('{"eval_type_id": ["core"]}', "'eval_type_id' is no text"),
        ('{"eval_type_id": "core", "eval_config": []}', "'eval_config' is no object"),
        ('{"eval_type_id": "core"}', "'eval_result_metrics' is empty"),
        ('{"eval_type_id": "core", "eval_result_metrics": {"sparsity": {"l0": true}}}', "'l0' is no number"),
        ('{"eval_type_id": "core", "eval_result_metrics": {"sparsity": {"l0": 1e999}}}', "'l0' is no number"),
        ('{"eval_type_id": "core", "eval_result_metrics": {"misc": {"frac_alive": 7}}}', "between 0 and 1"),
        ('{"eval_type_id": "sparse_probing", "eval_result_metrics": {"sae": {}}, "eval_result_details": [{}]}',
         "has no 'dataset_name'"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_and_exit_2(folder, tmp_path, capsys, content, told):
    path = tmp_path / "theirs.json"
    path.write_text(content)
    with pytest.raises(RequestError, match="`beside`"):
        saebench.read(path)
    assert report.main([str(folder), "--beside", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --beside")
    assert told in error
    assert error.count("\n") == 1


def test_names_in_saebench_files_are_escaped(small, tmp_path, capsys):
    content = json.loads(THEIRS[1].read_text())
    content["sae_lens_id"] = "x\x1b[2J|<script>alert(1)</script>" + "y" * 5000
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(content))
    assert report.main([str(small), "--beside", str(path), "-o", str(tmp_path / "r.html")]) == 0
    assert "<script>alert" not in (tmp_path / "r.html").read_text()
    capsys.readouterr()
    assert report.main([str(small), "--beside", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names_in_our_files_are_escaped(name, tmp_path, capsys):
    hostile = NAMES[name]
    folder = write_set(tmp_path / "in", layers=[4], edit=lambda cells: {**measured({hostile: cells["gender"]})})
    (path,) = folder.rglob("*.json")
    for key in ("model_name", "sae", "sae_label"):
        forge(path, at("_run", "config", key, value=hostile))
    out = tmp_path / "out"
    assert report.main([str(folder), "--saebench", str(out)]) == 0
    assert {path.parent for path in out.rglob("*.json")} == {out / "core", out / "sparse_probing"}
    assert all(re.fullmatch(r"[\w.-]{1,150}", path.name) for path in out.rglob("*.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    capsys.readouterr()
    assert report.main([str(folder), "--beside", *map(str, THEIRS)]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))


@pytest.mark.parametrize(
    ("figures", "code"),
    [({"dead": 5.0}, 2), ({"dead": -1e-9}, 0), ({"ce_zero": 3.0, "ce_model": 3.0}, 0), ({"kl_zero": 0.0}, 0)],
)
def test_invalid_figures_in_our_files_are_one_line(figures, code, tmp_path, capsys):
    folder = write_set(tmp_path / "in", layers=[4], edit=lambda cells: {**measured(cells), **figures})
    assert report.main([str(folder), "--beside", str(THEIRS[0])]) == code
    told = capsys.readouterr()
    assert told.err.count("\n") == (code == 2)
    assert report.main([str(folder), "--saebench", str(tmp_path / "out")]) == 0


def test_a_probe_named_like_a_figure_is_not_a_figure(tmp_path, capsys):
    folder = write_set(tmp_path / "in", layers=[4], edit=lambda cells: {"ce_zero": cells["gender"]})
    assert report.main([str(folder), "--beside", str(THEIRS[0])]) == 0
    assert report.main([str(folder)]) == 0


def test_outputs_that_exclude_each_other(folder, tmp_path, capsys):
    for flags in (["--saebench", str(tmp_path), "--csv", "x.csv"], ["--beside", str(THEIRS[0]), "--summary"]):
        assert report.main([str(folder), *flags]) == 2
        assert "(see --help)" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert report.main([str(folder), "--saebench", str(tmp_path / "file")]) == 2
    assert "--saebench" in capsys.readouterr().err
