"""The rules of the house: data flows one way, and only the command line knows how it was asked for."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {  # file or folder -> what it may import of the project, besides `errors`
    "errors": set(),
    "config": set(),
    "command_line": {"config", "datasets_wikidata"},
    "tasks": {"tasks", "terminal"},
    "datasets_wikidata": {"tasks"},
    "gemm": set(),
    "compiled": set(),
    "error_kernels": {"compiled"},
    "sae_formats": {"compiled", "gemm", "sae_formats"},
    "sae_loader": {"sae_formats"},
    "reconstruction": {"error_kernels", "sae_formats", "sae_loader"},
    "model_hooks": {"gemm", "model_hooks"},
    "language_model": {"gemm", "model_hooks"},
    "bounded_queue": set(),
    "progress": {"bounded_queue"},
    "file_lock": set(),
    "installed": set(),
    "interrupts": set(),
    "terminal": set(),
    "out_of_memory": set(),
    "cores": set(),
    "activations": {"datasets_wikidata", "language_model", "out_of_memory", "progress", "reconstruction", "sae_loader",
                    "cores"},
    "calibration": {"datasets_wikidata", "language_model"},
    "shard_folder": {"file_lock", "whole_file"},
    "fit_cache": {"folds", "gemm", "installed", "probes", "selectivity", "shard_folder"},
    "setup_cache": {"datasets_wikidata", "installed", "language_model", "shard_folder"},
    "activation_cache": {"language_model", "shard_folder"},
    "preflight": {"calibration", "datasets_wikidata", "language_model", "sae_loader"},
    "inspection": {"calibration", "language_model", "preflight", "report", "sae_loader"},
    "planning": {"activations", "baselines", "calibration", "config", "datasets_wikidata", "language_model", "probes",
                 "reconstruction", "records", "sae_loader", "setup_cache"},
    "loading": {"activation_cache", "activations", "baselines", "calibration", "config", "datasets_wikidata",
                "fit_cache", "language_model", "out_of_memory", "pipeline", "planning", "preflight", "records",
                "sae_loader", "selectivity"},
    "baselines": {"calibration", "datasets_wikidata", "language_model", "sae_loader"},
    "code_store": {"activations", "language_model", "sae_loader"},
    "row_store": {"activations", "code_store", "language_model", "out_of_memory"},
    "probe_backends": {"compiled", "gemm", "out_of_memory", "probe_backends", "probes"},
    "probes": {"probe_backends"},
    "uncertainty": set(),
    "probe_statistics": {"uncertainty"},
    "folds": set(),
    "selectivity": {"folds", "out_of_memory", "probe_statistics", "probes"},
    "whole_file": set(),
    "scores": {"probe_statistics", "whole_file"},
    "records": {"file_lock", "installed", "whole_file"},
    "sae_level": {"probe_statistics", "records", "scores", "uncertainty"},
    "report": {"records", "reporting", "terminal", "whole_file"},
    "reporting": {"records", "reporting", "terminal", "whole_file"},
    "validation": {"folds", "calibration", "datasets_wikidata", "probe_statistics", "probes", "report", "sae_loader",
                   "selectivity", "uncertainty", "validation"},
    "prober": {"folds", "activations", "bounded_queue", "datasets_wikidata", "language_model", "probes", "progress",
                 "probe_statistics", "reconstruction", "records", "row_store", "sae_level",
                 "sae_loader", "scores", "selectivity", "cores"},
    "pipeline": {"activations", "bounded_queue", "cores", "prober"},
    "sweep": {"command_line", "records", "report", "reporting", "terminal"},
    "scale": {"baselines", "config", "file_lock", "language_model", "main", "planning", "progress", "records", "report",
              "sae_level", "scale", "scores"},
    "compute_selectivity": {"command_line", "config", "interrupts", "main", "planning", "report", "sae_level", "scale",
                            "sweep", "terminal"},
}  # fmt: skip


def python_files() -> list[Path]:
    found = [*ROOT.glob("*.py"), *(p for room in MAY_IMPORT for p in (ROOT / room).glob("**/*.py"))]
    return sorted(path for path in found if path.name != "main.py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_flow_of_the_data(path):
    assert room(path) in MAY_IMPORT, f"{path.name} has no place in the house yet: give it one above"
    ours = imported(path) & (MAY_IMPORT.keys() | {"main"})
    assert ours <= MAY_IMPORT[room(path)] | {"errors"}


def test_only_the_command_line_and_main_see_the_run_config():
    users = {path.name for path in [*python_files(), ROOT / "main.py"] if "RunConfig" in path.read_text("utf-8")}
    parts_of_main = {"command_line.py", "config.py", "planning.py", "loading.py"}
    many_workers = {"compute_selectivity.py", "units.py", "estimate.py"}  # the other program, around main's own code
    assert users == {"main.py"} | parts_of_main | many_workers


def test_the_queue_knows_nothing_of_torch():
    assert "torch" not in imported(ROOT / "bounded_queue.py")


def test_no_library_prints():
    allowed = {"terminal.py"}
    for path in python_files():
        if path.name not in allowed:
            assert not re.search(r"^\s*print\(", path.read_text("utf-8"), re.MULTILINE), path.name
