"""Run the program on the tiny model, in this process or in another one, and read its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from delta_selectivity.cli import main as program
from delta_selectivity.records import result_file

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("started", "seconds", "resources")  # entries that may differ between two runs of one request


@dataclass(frozen=True)
class Request:
    """A request to the program."""

    model: Path
    saes: tuple[Path, ...]
    data: Path
    out: Path
    more: tuple[str, ...] = ("--folds", "3", "--repeats", "1")

    @property
    def argv(self) -> list[str]:
        saes = ",".join(map(str, self.saes))
        names = ["--model_name", self.model, "--sae_name", saes, "--output_directory", self.out]
        fixed = [*map(str, names), "--device1", "cpu", "--device2", "cpu", "--quiet"]
        return [*fixed, *(["--dataset_file", str(self.data)] if self.data.name else []), *self.more]

    def into(self, out: Path) -> Request:
        return replace(self, out=out)

    def plus(self, *flags: str) -> Request:
        return replace(self, more=(*self.more, *flags))

    def run(self, seconds: float = 120) -> int:
        """Run in this process, in a thread with a time limit; return the exit code."""
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(program.main(self.argv)), daemon=True)
        thread.start()
        thread.join(seconds)
        assert not thread.is_alive(), "the run hangs"
        assert codes, "the run ended with an exception that main should have told"
        return codes[0]

    def start(self, **options: Any) -> subprocess.Popen[str]:
        """Start a process of its own, with one thread."""
        asked = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        command = [sys.executable, str(ROOT / "main.py"), *self.argv]
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **asked)


def files(folder: Path) -> list[Path]:
    """Return the result files below the folder."""
    return sorted(path for path in folder.glob("**/*.json") if not path.name.startswith("."))


def numbers(folder: Path) -> dict[str, Any]:
    """Return relative path -> layers."""
    found = {str(path.relative_to(folder)): result_file.read(path) for path in files(folder)}
    return {path: {name: value for name, value in file.items() if name != "_run"} for path, file in found.items()}


def without_q(layers: dict[str, Any]) -> dict[str, Any]:
    """Return layers without their q values, which depend on all measured results of an SAE."""
    return {
        layer: {
            name: {k: v for k, v in value.items() if not k.endswith("q_value")} if isinstance(value, dict) else value
            for name, value in record.items()
        }
        for layer, record in layers.items()
    }


def substance(folder: Path) -> dict[str, str]:
    """Return relative path -> the file's text without timings, commit and the folder's own name."""
    found = {}
    for path in files(folder):
        content = result_file.read(path)
        text = path.read_text(encoding="utf-8")
        assert text == json.dumps(content, indent=2, allow_nan=False) + "\n", "not as the program writes it"
        for name in (*TIMINGS, "commit"):  # a commit may be made while a long test runs
            del content["_run"][name]
        del content["_run"]["config"]["output_directory"]
        found[str(path.relative_to(folder))] = json.dumps(content, indent=2)
    return found


def scores_of(folder: Path) -> dict[str, bytes]:
    """Return relative path -> the bytes of the stored out-of-fold scores."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("**/*.safetensors"))}


def left_over(folder: Path) -> list[str]:
    """Return the hidden files below the folder."""
    return sorted(path.name for path in folder.glob("**/.*"))


def assert_close(found: Any, expected: Any, relative: float = 1e-5, absolute: float = 1e-6, where: str = "") -> None:
    """Check that two trees of numbers have the same names and nearly equal numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            steps = (
                2 if name == "n_iter" else absolute
            )  # other batches round differently, which may change the number of steps of a fit by one
            assert_close(found[name], expected[name], relative, steps, f"{where}/{name}")
    elif isinstance(expected, int | float) and not isinstance(expected, bool):
        assert abs(found - expected) <= absolute + relative * abs(expected), f"{where}: {found}, not {expected}"
    else:
        assert found == expected, where
