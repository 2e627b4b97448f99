"""scripts/: one for each model and task; each is a short call of main.py that works from any directory."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from delta_selectivity.cli.command_line import parse
from delta_selectivity.run.request import Request
from delta_selectivity.tasks import DATASET_NAMES
from delta_selectivity.tasks.wikidata import load_wikidata

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
ROOT = SCRIPTS.parent
MODELS = {  # name in the scripts -> model, SAEs, hook point
    "pythia70": ("EleutherAI/pythia-70m", "EleutherAI/sae-pythia-70m-32k", "resid_post"),
    "pythia160": ("EleutherAI/pythia-160m", "EleutherAI/sae-pythia-160m-32k", "resid_post"),
    "pythia410": ("EleutherAI/pythia-410m", "EleutherAI/sae-pythia-410m-65k", "mlp_out"),
}
ONE_TASK = {f"compute_{model}_wiki_{task}.sh": (model, task) for model in MODELS for task in DATASET_NAMES}
SELECT = "select_wikidata.sh"


def call(script, *flags, cwd=ROOT, **variables):
    """Run a script of this checkout, or at another path."""
    environment = {name: value for name, value in os.environ.items() if name not in {"DEMO", "DRY_RUN"}}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([SCRIPTS / script, *flags], cwd=cwd, env=environment, capture_output=True, text=True)


def flags_of(*words, **variables):
    """Return the flags that a script would pass to main.py."""
    done = call(*words, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    python, program_file, *flags = shlex.split(done.stdout)
    assert (Path(python), Path(program_file)) == (ROOT / ".venv" / "bin" / "python", ROOT / "main.py")
    return flags


def parsed(flags) -> Request:
    return parse(flags).request


def test_there_is_one_for_each_model_and_task_and_no_other():
    assert {path.name for path in SCRIPTS.glob("compute_*.sh")} == ONE_TASK.keys()


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash_and_stop_at_errors(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text("utf-8")
    sourced = {"environment.sh", "evaluate.sh"}
    assert path.name in sourced or ("set -euo pipefail" in text and os.access(path, os.X_OK))


@pytest.mark.parametrize("script", ONE_TASK)
def test_scripts_request_their_model_and_task(script):
    model, task = ONE_TASK[script]
    request = parsed(flags_of(script))
    assert (request.model, *request.saes, request.settings.hookpoint) == MODELS[model]
    assert (request.tasks, request.layers, request.settings.shuffle_select_n) == ((task,), None, None)
    assert request.output == ROOT / "results" / model


@pytest.mark.parametrize("model", MODELS)
def test_all_tasks_of_a_model_go_into_one_run(model):
    request = parsed(flags_of(SELECT, model))
    assert (request.model, *request.saes, request.settings.hookpoint) == MODELS[model]
    assert (request.tasks, request.output) == (tuple(DATASET_NAMES), ROOT / "results" / model)


def test_flags_are_passed_on_and_take_precedence():
    own = ["--dataset_file", "my people; $(x).csv", "--output_directory", "el sewhere", "--layers", "0-3"]
    request = parsed(flags_of("compute_pythia160_wiki_gender.sh", *own))
    assert (request.tasks[-1].path_or_name, request.layers) == ("my people; $(x).csv", (0, 1, 2, 3))
    assert request.output == Path("el sewhere")


@pytest.mark.parametrize(("words", "told"), [([], "usage"), (["gpt5"], "gpt5")])
def test_a_model_that_has_no_scripts_is_a_wrong_request(words, told):
    done = call(SELECT, *words, DRY_RUN="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_demo_script_does_not_touch_the_kept_results():
    for script, task in (
        ("compute_pythia410_wiki_gender.sh", "gender"),
        ("compute_pythia70_wiki_politics.sh", "politics"),
    ):
        request = parsed(flags_of(script, DEMO="1"))
        assert Path(request.model).name == "tiny-pythia"
        assert (request.tasks, request.settings.hookpoint) == ((task,), None)
        assert request.output == ROOT / "results" / f"demo_{task}"
        assert request.settings.shuffle_select_n


@pytest.fixture
def elsewhere(tmp_path):
    """Create a project with a space in its path: the scripts are copies, everything else is this checkout's."""
    project = tmp_path / "a project"
    shutil.copytree(SCRIPTS, project / "scripts", ignore=lambda _, names: [n for n in names if not n.endswith(".sh")])
    for path in (ROOT / "main.py", ROOT / ".venv", ROOT / "pyproject.toml", *ROOT.glob("requirements*.txt")):
        (project / path.name).symlink_to(path)
    return project


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_scripts_return_the_exit_code_and_log_the_output(elsewhere, tmp_path, code):
    (elsewhere / ".venv").unlink()
    (elsewhere / "scripts" / "environment.sh").write_text("")
    python = elsewhere / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\necho "${{@: -2}}"\necho err >&2\npwd\nexit {code}\n')
    python.chmod(0o755)
    shown = f"--seed 3\nerr\n{tmp_path}\n"
    log = elsewhere / "logs" / "compute_pythia70_wiki_gender.log"
    for n_runs in (1, 2):
        done = call(elsewhere / "scripts" / "compute_pythia70_wiki_gender.sh", "--seed", "3", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, shown), "a relative path among the flags is the caller's"
        logged = log.read_text("utf-8")
        assert logged.count(shown) == n_runs, "a log grows"
        assert len(re.findall(r"^\d{4}-\d\d-\d\dT.*main.py .*--seed 3$", logged, re.MULTILINE)) == n_runs


def test_the_demo_runs_from_any_folder_without_a_network(elsewhere, tmp_path):
    load_wikidata("gender")  # uses the network if this test is the first to need the data files
    script = elsewhere / "scripts" / "compute_pythia160_wiki_gender.sh"
    more = ("--layers", "5", "--shuffle_select_n", "60", "--repeats", "1", "--output_directory", "out here")
    done = call(script, *more, cwd=tmp_path, DEMO="1", HTTPS_PROXY="http://localhost:9")
    assert done.returncode == 0, done.stdout
    found = {path.parent.name for path in (tmp_path / "out here").glob("*/tiny-pythia_wikidata_gender.json")}
    assert found == {"tiny-pythia-saes-k8", "tiny-pythia-saes-k32"}
    assert "delta_sel" in (elsewhere / "logs" / "compute_pythia160_wiki_gender.log").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["compute_pythia410_wiki_is_alive.sh"], [SELECT, "pythia160"]], ids=lambda words: words[0]
)
def test_the_demo_command_of_the_readme(words, elsewhere):
    done = call(elsewhere / "scripts" / words[0], *words[1:], cwd=elsewhere, DEMO="1")
    assert done.returncode == 0, done.stdout
    (out,) = (elsewhere / "results").iterdir()
    tasks = DATASET_NAMES if words[0] == SELECT else ["is_alive"]
    assert out.name == f"demo_{'_'.join(tasks)}"
    assert {path.stem for path in out.glob("*/*.json")} == {f"tiny-pythia_wikidata_{task}" for task in tasks}


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["layers.15", "layers.25"], "assets/smollm2-saes"),
        (["topk/layers.15", "gated/layers.15"], "assets/smollm2-saes/*"),
    ],
    ids=["one SAE", "several"],
)
def test_the_real_model_is_measured_on_all_tasks_and_reported(folders, named, elsewhere):
    (elsewhere / ".venv").unlink()
    for folder in folders:
        (elsewhere / "assets" / "smollm2-saes" / folder).mkdir(parents=True)
    python = elsewhere / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/usr/bin/env bash\nprintf '%q ' \"$@\"\nprintf '\\n'\n")
    python.chmod(0o755)
    (elsewhere / "scripts" / "environment.sh").write_text(
        f"project={shlex.quote(str(elsewhere))}\npython=$project/.venv/bin/python\n"
    )
    done = call(elsewhere / "scripts" / "real_model.sh", "--layers", "15", cwd="/")
    assert done.returncode == 0, done.stderr
    (program, *flags), *reports = [shlex.split(line) for line in done.stdout.splitlines() if ".py" in line]
    request = parsed(flags)
    assert (program, request.model, request.saes) == ("main.py", "smollm2-135m", (named,))
    assert (request.tasks, request.settings.shuffle_select_n) == (tuple(DATASET_NAMES), 1000)
    assert (request.layers, request.output) == ((15,), Path("results/real_model"))
    assert reports == [
        ["report.py", "results/real_model", "--resources"],
        ["report.py", "results/real_model", "-o", "results/real_model/report.html"],
    ]


def test_the_documents_name_modules_that_exist():
    """`python benchmarks/x.py` finds neither the package nor its neighbours in a clone that is not installed."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("assets/**/*.md"), *ROOT.glob("docs/**/*.md")]
    code = [
        path for folder in ("benchmarks", "delta_selectivity", "scripts") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    modules = set()
    for path in {*texts, *code} - {ROOT / "CHANGELOG.md"}:
        text = path.read_text("utf-8")
        assert not re.search(r"python (scripts|benchmarks)/", text), path
        modules |= set(re.findall(r"python -m ((?:scripts|benchmarks)\.\w+)", text))
    assert len(modules) > 30
    for module in modules:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


@pytest.mark.parametrize("module", ["scripts.train_saes", "benchmarks.bench_demo"])
def test_a_module_starts_in_a_clone_that_is_not_installed(module):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
