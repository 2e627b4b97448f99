"""The layers of the package: a file imports only its own folder and those below it. Types fit."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from delta_selectivity.cli.command_line import known_flags

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "delta_selectivity"
LAYERS = [  # from bottom to top; folders on one line do not import each other
    {"errors"},
    {"settings", "system"},
    {"tasks", "models", "saes", "probing"},
    {"records"},
    {"caches", "reporting"},
    {"run"},
    {"scale", "api"},
    {"cli"},
]
STORAGE = {  # stores bytes, and affects no number
    f"{PACKAGE}.{name}" for name in ("caches.shard_folder", "system.file_lock", "system.whole_file")
}
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def room(module: str) -> str:
    """Return the folder of a module: `delta_selectivity.saes.sae` -> `saes`; `` for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def imported(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, at any place."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in below if module_file(name)} or {node.module}
    return {name for name in names if name.partition(".")[0] == PACKAGE}


def module_file(name: str) -> Path | None:
    """Return the file of a module of the package, if there is one."""
    path = ROOT / name.replace(".", "/")
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in found if file.is_file()), None)


def test_types_fit():
    """Here, and not before the tests, so that it runs beside them: it keeps a core busy for most of a minute."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_a_file_imports_only_its_own_folder_and_those_below(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    floor = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    own = room(module)
    for other in {room(name) for name in imported(path)} - {own, ""}:
        assert floor[other] < floor.get(own, len(LAYERS)), f"{module} imports {other}"


def test_the_package_imports_no_other_folder():
    for path in FILES:
        text = path.read_text("utf-8")
        assert not re.search(
            r"^\s*(from|import) (benchmarks|explore|scripts|tests|validation|main)\b", text, re.MULTILINE
        )


def test_there_are_few_files_at_the_top_and_they_are_short():
    files = sorted(ROOT.glob("*.py"))
    assert len(files) <= 8
    assert all(len(path.read_text("utf-8").splitlines()) <= 40 for path in files)


def test_the_queue_does_not_use_torch():
    assert "torch" not in (ROOT / PACKAGE / "run" / "bounded_queue.py").read_text("utf-8")


def test_no_library_prints():
    for path in FILES:
        if path.name != "terminal.py":
            assert not re.search(r"^\s*print\(", path.read_text("utf-8"), re.MULTILINE), path.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_a_file_opens_with_its_purpose_in_one_sentence(path):
    purpose = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert purpose, path.name
    first = purpose.partition("\n")[0]
    assert first[0].isupper() or first[0] in "`0123456789"
    assert first.endswith((".", "?")), first


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_fields_are_documented_by_comments(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef):
            for field, after in itertools.pairwise(node.body):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert not (isinstance(field, ast.AnnAssign) and is_text), ast.unparse(field)


def test_no_flag_is_named_outside_the_command_line():
    ours = re.compile(rf"(?<![\w-])--({'|'.join(known_flags())})\b")
    for path in FILES:
        if room(".".join(path.relative_to(ROOT).with_suffix("").parts)) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isspace():
                assert path.name == "wheel.py" or not ours.search(node.value), (path.name, node.value)
