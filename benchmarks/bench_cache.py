"""What a second SAE costs once the first has filled `--cache_dir`: the whole job, cold and warm.

python benchmarks/bench_cache.py run    # the bundled SAEs, one after the other and the other way round: ten minutes
python benchmarks/bench_cache.py        # the table, from what `run` kept

A pair is two runs of `main.py` on all data with a fresh cache, each timed from its start to its end: the first SAE
cold, then the second warm. Last: how many times as long the cold run of its pair took, and that of the same SAE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import report  # noqa: E402 - the project is not installed as a package
from benchmarks.timing import answer, parser  # noqa: E402

SAES = ("tiny-pythia-saes-k8", "tiny-pythia-saes-k32")
QUICK = ["--datasets", "politics", "--layers", "0,1", "--shuffle_select_n", "100", "--repeats", "1"]
HEADER = ("SAE", "cache", "whole job, s", "forward, s", "SAE, s", "probes, s", "cold, its pair", "cold, same SAE")


@dataclass(frozen=True)
class Run:
    """One run of `main.py`."""

    sae: str
    warm: bool
    seconds: float  # from the start of the process to its end
    stages: dict[str, float]  # seconds of all threads together

    @classmethod
    def of(cls, sae: str, cache: Path, out: Path, flags: list[str]) -> Run:
        """Measure all that there is of an SAE with this cache."""
        warm = cache.exists()
        command = [sys.executable, str(PROJECT / "main.py"), "--sae_name", str(PROJECT / "assets" / sae), "--quiet"]
        command += ["--cache_dir", str(cache), "--output_directory", str(out), *flags]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        runs = [json.loads(path.read_text(encoding="utf-8"))["_run"]["seconds"] for path in out.glob("*.json")]
        return cls(sae, warm, seconds, max(runs, key=lambda stages: stages["total"]))


def measure(asked: argparse.Namespace) -> list[report.Row]:
    """Both pairs."""
    flags = QUICK if asked.quick else []
    runs = []
    for first, second in (SAES, SAES[::-1]):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            runs += [Run.of(sae, place / "cache", place / sae, flags) for sae in (first, second)]
    cold = {run.sae: run.seconds for run in runs if not run.warm}
    rows: list[report.Row] = [HEADER]
    for run in runs:
        pair = next(sae for sae in SAES if sae != run.sae)
        shares = [f"{cold[sae] / run.seconds:.1f}x" for sae in (pair, run.sae)] if run.warm else ["", ""]
        stages = [f"{run.stages[stage]:.0f}" for stage in ("forward", "sae", "probes")]
        rows.append((run.sae, "warm" if run.warm else "cold", f"{run.seconds:.0f}", *stages, *shares))
    return rows


def main() -> None:
    asked = parser(__doc__).parse_args()
    print(answer("bench_cache", asked, lambda: measure(asked)))


if __name__ == "__main__":
    main()
