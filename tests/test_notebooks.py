"""explore/: the notebooks are kept without outputs, and run on the kept results and on those of a new run."""

from __future__ import annotations

import ast
import html
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
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


# --- the first cell, for hosted notebooks


def first_cell(path=NOTEBOOKS[0]):
    return next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")


@pytest.fixture
def commands(monkeypatch):
    """The commands that the first cell runs: git as it is, pip not."""
    found = []

    def run(command, **options):
        found.append([str(word) for word in command])
        return real(command, **options) if command[0] == "git" else None

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != EXPLORE])
    for variable in ("REPOSITORY", "RESULTS"):
        monkeypatch.delenv(variable, raising=False)
    return found


@pytest.fixture
def without_the_package(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "delta_selectivity" else real(name))


def test_all_have_the_same_first_cell_and_show_the_page_in_the_last():
    assert len({first_cell(path) for path in NOTEBOOKS}) == 1
    assert {nbformat.read(path, as_version=4).cells[-1].source for path in NOTEBOOKS} == {"show_page(RESULTS)"}


def test_in_a_clone_with_the_package_the_first_cell_runs_nothing(commands, monkeypatch):
    monkeypatch.chdir(EXPLORE)
    monkeypatch.syspath_prepend(EXPLORE)  # as a kernel has it
    exec(first_cell(), {})
    assert commands == []


def test_in_a_clone_without_the_package_the_first_cell_installs_the_clone(commands, without_the_package, monkeypatch):
    monkeypatch.chdir(EXPLORE)
    monkeypatch.syspath_prepend(EXPLORE)
    exec(first_cell(), {})
    assert commands == [[sys.executable, "-m", "pip", "install", "--quiet", str(ROOT)]]


def test_in_an_empty_folder_the_first_cell_clones_an_address_once(commands, without_the_package, monkeypatch, tmp_path):
    origin = tmp_path / "origin"
    (origin / "explore").mkdir(parents=True)
    (origin / "explore" / "shared.py").write_text("FROM = 'the clone'\n", "utf-8")
    git = ("git", "-C", origin, "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "-m", "all")):
        subprocess.run([*git, *words], check=True)
    commands.clear()
    (tmp_path / "content").mkdir()
    monkeypatch.chdir(tmp_path / "content")
    monkeypatch.setenv("REPOSITORY", origin.as_uri())
    for _ in range(2):
        exec(first_cell(), {})
    clone = tmp_path / "content" / "delta-selectivity"
    install = [sys.executable, "-m", "pip", "install", "--quiet", str(clone)]
    assert commands == [["git", "clone", "--quiet", "--depth", "1", origin.as_uri(), clone.name], install, install]
    assert importlib.util.find_spec("shared").origin == str(clone / "explore" / "shared.py")


def test_a_folder_with_a_clone_is_used_as_it_is(commands, without_the_package, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPOSITORY", str(ROOT))
    exec(first_cell(), {})
    assert commands == [[sys.executable, "-m", "pip", "install", "--quiet", str(ROOT)]]
    assert str(EXPLORE) in sys.path
    assert not list(tmp_path.iterdir())


def test_without_a_clone_the_first_cell_says_what_to_set(commands, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="set REPOSITORY"):
        exec(first_cell(), {})
    assert commands == []


def test_the_address_is_that_of_the_package():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"].get("urls", {})
    assert f'environ.get("REPOSITORY", "{urls.get("Repository", "")}")' in first_cell()


# --- whole notebooks


def executed(path, monkeypatch, tmp_path, results=None):
    """Run a notebook, whose last cell shows the page, in its own folder; return its text and its number of plots."""
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if results is not None:
        monkeypatch.setenv("RESULTS", str(results))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(EXPLORE)}}
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].outputs == [], "the first cell installs nothing here"
    (shown,) = code[-1].outputs
    assert "<title>" in html.unescape(re.fullmatch(r'<div><iframe srcdoc="([^"]+)".*', shown.data["text/html"])[1])
    outputs = [output for cell in code for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    return printed, sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@each
def test_notebooks_run_on_the_kept_results(path, monkeypatch, tmp_path):
    printed, n_plots = executed(path, monkeypatch, tmp_path)
    assert n_plots > 0
    assert "Warning" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["analyze_results", "compare_saes"])
def test_it_runs_on_results_of_another_model(name, monkeypatch, tmp_path):
    results = Path("results", "smollm2")  # relative to the repository; kept without scores
    assert executed(EXPLORE / f"{name}.ipynb", monkeypatch, tmp_path, results)[1] > 0


@pytest.mark.slow
def test_without_scores_there_are_no_rows_to_show(monkeypatch, tmp_path):
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="results/smollm2: no stored scores, so no rows"):
        executed(EXPLORE / "what_was_lost.ipynb", monkeypatch, tmp_path, Path("results", "smollm2"))


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
    p, q = map(float, re.search(r"largest difference from the file: p (\S+), q (\S+)", printed).groups())
    assert p < 2 / 50 and q < 1e-6
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
def test_one_sae_is_compared_with_a_baseline_and_alone_is_refused(fresh, monkeypatch, tmp_path):
    from nbclient.exceptions import CellExecutionError

    one = tmp_path / "one"
    shutil.copytree(fresh / "sae-tiny", one / "sae-tiny")
    with pytest.raises(CellExecutionError, match="one has one SAE; this notebook compares two"):
        executed(EXPLORE / "compare_saes.ipynb", monkeypatch, tmp_path, one)
    shutil.copytree(fresh / "baselines", one / "baselines")
    printed, n_plots = executed(EXPLORE / "compare_saes.ipynb", monkeypatch, tmp_path, one)
    assert re.search(r"sae-tiny and \S*mean\S*, 18 cells", printed)
    assert n_plots == 3


@pytest.mark.slow
def test_published_figures_are_compared_with_a_run(fresh, monkeypatch, tmp_path):
    shutil.copytree(fresh / "sae-tiny", tmp_path / "pythia160")
    printed, _ = executed(EXPLORE / "compare_published.ipynb", monkeypatch, tmp_path, tmp_path)
    assert "6 layers of datasets that both have measured" in printed, "gender and occupation, three layers each"
    assert "pythia-410m: there is no run of ours" in printed
