"""The package as it is declared, built and installed."""

from __future__ import annotations

import ast
import email
import importlib.metadata
import os
import re
import site
import statistics
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from delta_selectivity.cli.program import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "delta_selectivity"
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = DECLARED["project"]
NOT_INSTALLED_HERE = {"cuml": "cuml-cu13", "cupy": "cupy-cuda13x"}  # module -> distribution
USED_WHERE_INSTALLED = {"dask_cuda", "pip"}
IMPORT_SECONDS = 0.2
BEHIND = "behind.pth"


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """Return requirements by normalised name, without extras of the project itself."""
    found = {canonicalize_name(parsed.name): parsed for parsed in map(Requirement, lines)}
    return {name: parsed for name, parsed in found.items() if name != PROJECT["name"]}


def pins(file: str) -> dict[str, Requirement]:
    lines = (ROOT / file).read_text("utf-8").splitlines()
    return requirements([line for line in lines if line.strip() and not line.startswith("#")])


EXTRAS = {name: requirements(lines) for name, lines in PROJECT["optional-dependencies"].items()}
DEPENDENCIES = requirements(PROJECT["dependencies"])


def third_party_imports() -> dict[str, str]:
    """Return top-level module -> a file that imports it in any way."""
    found: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        for name in modules(ast.parse(path.read_text("utf-8"))):
            found[name.partition(".")[0]] = str(path.relative_to(ROOT))
    left_out = {*sys.stdlib_module_names, PACKAGE.name, *USED_WHERE_INSTALLED}
    return {name: path for name, path in found.items() if name not in left_out}


def modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in {"import_module", "find_spec"}:
                yield str(node.args[0].value)


# --- what is declared


def test_version_and_keywords_are_the_same_everywhere() -> None:
    version = PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (citation["version"], citation["keywords"]) == (version, PROJECT["keywords"])
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None and newest.group(1) == version


def test_licence_and_notices_are_there() -> None:
    assert PROJECT["license"] == "MIT"
    assert "Copyright (c) 2026 Delta Selectivity contributors" in (ROOT / "LICENSE").read_text("utf-8")
    notice = (ROOT / "NOTICE").read_text("utf-8")
    for card in ROOT.glob("assets/*/README.md"):
        assert card.parent.name in notice
    assert all(words in notice for words in ("CC BY-SA 4.0", "sae-probes 0.4.2", "pythia_wikidata.csv"))
    assert "license: MIT" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_every_import_is_declared() -> None:
    distributions = importlib.metadata.packages_distributions()
    known = DEPENDENCIES.keys() | {name for extra in EXTRAS.values() for name in extra}
    for module, path in third_party_imports().items():
        names = set(map(canonicalize_name, distributions.get(module, [NOT_INSTALLED_HERE.get(module, "")])))
        assert names & known, f"{path} imports {module}, which pyproject.toml does not declare"


def test_every_dependency_is_imported() -> None:
    by_others = {"accelerate"}  # used by transformers, for GGUF files
    to_come = {"pandas"}  # used by `Results.to_frame`
    distributions = importlib.metadata.packages_distributions()
    imported = {canonicalize_name(name) for module in third_party_imports() for name in distributions.get(module, [])}
    assert DEPENDENCIES.keys() - to_come - by_others <= imported


@pytest.mark.parametrize(
    ("file", "declared"),
    [
        ("requirements.txt", DEPENDENCIES),
        (
            "requirements-dev.txt",
            {
                name: pin
                for extra in ("dev", "docs", "explore", "scale", "tensorboard", "wandb")
                for name, pin in EXTRAS[extra].items()
            },
        ),
    ],
)
def test_pins_are_within_the_declared_ranges_and_no_others(file: str, declared: dict[str, Requirement]) -> None:
    pinned = pins(file)
    assert pinned.keys() == declared.keys()
    for name, pin in pinned.items():
        (exact,) = pin.specifier
        assert exact.operator == "==", pin
        assert declared[name].specifier.contains(exact.version), f"{pin} is outside of {declared[name]}"
        assert any(bound.operator == ">=" for bound in declared[name].specifier), f"{name} has no lower bound"


# --- what an import costs


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_import_is_quick_and_imports_nothing_heavier_than_numpy() -> None:
    code = (
        "import sys, time; started = time.perf_counter(); import delta_selectivity; "
        "print(time.perf_counter() - started, *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    runs = [run(sys.executable, "-c", code).stdout.split() for _ in range(5)]
    loaded = set(runs[0][1:])
    heavy = {name for name in third_party_imports() if name != "numpy"} | {"pandas"}
    assert PACKAGE.name in loaded
    assert not loaded & heavy
    assert statistics.median(float(run[0]) for run in runs) < IMPORT_SECONDS


# --- the console command


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_names_the_commands(words: list[str]) -> None:
    done = run(sys.executable, "-m", "delta_selectivity", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_an_unknown_command_is_a_wrong_request() -> None:
    done = run(sys.executable, "-m", "delta_selectivity", "fly")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "fly" in done.stderr and "report" in done.stderr


# --- what is built and installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the package as pip does, with this environment's hatchling."""
    pytest.importorskip("hatchling", reason="no hatchling: pip install -r requirements-dev.txt")
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir")
    done = run(sys.executable, "-m", "pip", "wheel", *options, folder, ROOT)
    assert done.returncode == 0, done.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an environment with the wheel, which also sees this environment's packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    options = ("--quiet", "--no-deps", "--no-index")
    done = run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", *options, wheel)
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / BEHIND).write_text("\n".join(site.getsitepackages()), "utf-8")
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_licence_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    information = f"delta_selectivity-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {PACKAGE.name, information}
    wanted = {f"{information}/licenses/LICENSE", f"{information}/licenses/NOTICE", "delta_selectivity/py.typed"}
    assert wanted <= set(names)
    sources = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.suffix in {".py", ".css", ".js"}}
    assert sources <= set(names)
    assert wheel.stat().st_size < 1 << 20
    assert not [name for name in names if name.endswith((".safetensors", ".json", ".csv"))]


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    folder = f"delta_selectivity-{PROJECT['version']}.dist-info"
    told = email.message_from_string(zipfile.ZipFile(wheel).read(f"{folder}/METADATA").decode())
    assert (told["Name"], told["Version"], told["Summary"]) == (
        "delta-selectivity",
        PROJECT["version"],
        PROJECT["description"],
    )
    assert (told["License-Expression"], told["Requires-Python"]) == ("MIT", ">=3.11")
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload() == (ROOT / "README.md").read_text("utf-8")
    assert told["Keywords"].split(",") == sorted(PROJECT["keywords"])
    assert set(told.get_all("Provides-Extra")) == EXTRAS.keys()
    assert told.get_all("Classifier") == PROJECT["classifiers"]


@pytest.mark.slow
def test_nothing_else_is_installed_and_the_command_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    (packages,) = installed.glob("lib/python*/site-packages")
    there = {path.name for path in packages.iterdir()} - {BEHIND}
    assert there == {PACKAGE.name, f"delta_selectivity-{PROJECT['version']}.dist-info"}
    bin_folder = installed / "bin"
    imported = run(bin_folder / "python", "-c", "import delta_selectivity as d; print(d.__file__)", cwd=tmp_path)
    assert imported.stdout.startswith(str(packages))
    for words in (["--help"], ["run", "--help"], ["report", "--help"]):
        shown = run(bin_folder / "delta-selectivity", *words, cwd=tmp_path)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout.startswith("usage: ")
    refused = run(bin_folder / "delta-selectivity", "fly", cwd=tmp_path)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    as_module = run(bin_folder / "python", "-m", PACKAGE.name, "--help", cwd=tmp_path)
    assert as_module.returncode == 0
    assert not list(tmp_path.iterdir())
