"""explore/: the notebooks are kept without outputs, and run on the kept results and on those of a new run."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import write_sparsify
from runs import Request

ROOT = Path(__file__).resolve().parent.parent
EXPLORE = ROOT / "explore"
NOTEBOOKS = sorted(EXPLORE.glob("*.ipynb"))
NAMES = {
    "analyze_results",
    "compare_published",
    "compare_saes",
    "explore_activations",
    "probe_backends",
    "what_was_lost",
}
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_all_notebooks_exist_and_are_listed():
    assert {path.stem for path in NOTEBOOKS} == NAMES
    page = (EXPLORE / "README.md").read_text("utf-8")
    assert set(re.findall(r"`(\w+)\.ipynb`", page)) == NAMES


@each
def test_notebooks_have_no_outputs_and_begin_with_their_purpose(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)
    for cell in code:
        ast.parse(cell.source)


@each
def test_notebooks_contain_no_local_paths(path):
    text = path.read_text("utf-8")
    assert not re.search(r"""["'\s](/(home|root|work|tmp|Users|mnt|opt|data)\b|[A-Z]:\\\\)""", text)


def executed(path, monkeypatch, tmp_path, results=None):
    """Run a notebook in its own folder; return its printed text and its number of plots."""
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if results is not None:
        monkeypatch.setenv("RESULTS", str(results))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(EXPLORE)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    return printed, sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@each
def test_notebooks_run_on_the_kept_results(path, monkeypatch, tmp_path):
    printed, n_plots = executed(path, monkeypatch, tmp_path)
    assert n_plots > 0
    assert "Warning" not in printed


@pytest.fixture(scope="module")
def fresh(tiny_model, tiny_saes, tmp_path_factory):
    """Return results of two SAEs with the scores of their rows."""
    folder = tmp_path_factory.mktemp("fresh")
    other = write_sparsify(folder / "sae-other", k=4)
    flags = ("--datasets", "gender,occupation", "--shuffle_select_n", "120", "--repeats", "2", "--baselines", "mean")
    assert Request(tiny_model, (tiny_saes, other), Path(), folder / "results", flags).run() == 0
    return folder / "results"


@pytest.mark.slow
def test_statistics_are_recomputed_from_the_scores_of_a_new_run(fresh, monkeypatch, tmp_path):
    printed, n_plots = executed(EXPLORE / "analyze_results.ipynb", monkeypatch, tmp_path, fresh)
    assert "36 cells made again from their scores" in printed, "2 SAEs x 3 layers x 6 probes; the baseline is left out"
    assert n_plots == 3


@pytest.mark.slow
def test_what_was_lost_runs_on_a_new_run(fresh, monkeypatch, tmp_path):
    printed, n_plots = executed(EXPLORE / "what_was_lost.ipynb", monkeypatch, tmp_path, fresh)
    assert re.search(r"rows of \w+, layer \d", printed)
    assert "add up to 1.000" in printed
    assert n_plots == 2


@pytest.mark.slow
def test_two_saes_of_a_new_run_are_compared(fresh, monkeypatch, tmp_path):
    printed, n_plots = executed(EXPLORE / "compare_saes.ipynb", monkeypatch, tmp_path, fresh)
    assert re.search(r"sae-other and sae-tiny, 18 cells", printed)
    assert n_plots == 3


@pytest.mark.slow
def test_published_figures_are_compared_with_a_run(fresh, monkeypatch, tmp_path):
    shutil.copytree(fresh / "sae-tiny", tmp_path / "pythia160")
    printed, _ = executed(EXPLORE / "compare_published.ipynb", monkeypatch, tmp_path, tmp_path)
    assert "6 layers of datasets that both have measured" in printed, "gender and occupation, three layers each"
    assert "pythia-410m: there is no run of ours" in printed
