"""Time an `Evaluator` in a training loop, and a cold run of the program on the same rows.

    python -m benchmarks.bench_evaluator          # print the kept table
    python -m benchmarks.bench_evaluator run      # measure five checkpoints of a TopK SAE in training, and keep them

Both sides measure gender on 1000 rows at layer 3 of the bundled model. The cold run is a process of its own, timed from
start to end, with an SAE folder of the same size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bundled import MODEL
from delta_selectivity import Evaluator
from delta_selectivity.records import result_file
from delta_selectivity.reporting.tables import Row, aligned

PROJECT = Path(__file__).resolve().parent.parent
KEPT = Path(__file__).resolve().with_suffix(".json")
LAYER, ROWS, CHECKPOINTS, STEPS = 3, 1000, 5, 50
SAMPLE = 16_384  # the default of an `Evaluator`
D_IN, D_SAE, K = 256, 1024, 32


class TopK(nn.Module):
    """A minimal TopK SAE."""

    def __init__(self) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(D_IN, D_SAE) / D_IN**0.5)
        self.W_dec = nn.Parameter(self.W_enc.detach().T.clone())
        self.b_dec = nn.Parameter(torch.zeros(D_IN))

    def encode(self, x: Tensor) -> Tensor:
        pre = torch.relu((x - self.b_dec) @ self.W_enc)
        top = pre.topk(K, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.W_dec + self.b_dec


def train(sae: TopK, optimizer: torch.optim.Optimizer) -> None:
    """Train for a few steps on random inputs; the quality does not matter for timing."""
    for _ in range(STEPS):
        x = torch.randn(256, D_IN)
        loss = (sae.decode(sae.encode(x)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def time_cold_run() -> float:
    """Return the seconds of one run of `main.py` on the same rows, without a cache."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, str(PROJECT / "main.py"), "--quiet", "--datasets", "gender", "--layers", str(LAYER),
            "--shuffle_select_n", str(ROWS), "--sae_name", str(PROJECT / "assets" / "tiny-pythia-saes-k32"),
            "--output_directory", out,
        ]  # fmt: skip
        start = time.perf_counter()
        subprocess.run(command, check=True)
        return time.perf_counter() - start


def processor() -> str:
    """Return the name of the processor."""
    amx = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{torch.get_num_threads()} cores, {torch.backends.cpu.get_cpu_capability()}{amx}"


def measure(repeats: int) -> dict[str, Any]:
    """Return the seconds of each side, run in turn: with all tokens, with a sample of the tokens, and as a cold run."""
    torch.manual_seed(0)
    sae = TopK()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    evaluators, made = {}, {}
    for name, n_tokens in (("all", None), ("sample", SAMPLE)):
        start = time.perf_counter()
        evaluators[name] = Evaluator(MODEL, LAYER, ["gender"], rows=ROWS, whole_tokens=n_tokens)
        made[name] = time.perf_counter() - start
    calls: dict[str, list[float]] = {name: [] for name in evaluators}
    colds: list[float] = []
    for _ in range(CHECKPOINTS):
        train(sae, optimizer)
        for name, evaluator in evaluators.items():
            start = time.perf_counter()
            evaluator(sae)
            calls[name].append(time.perf_counter() - start)
        if len(colds) < repeats:
            colds.append(time_cold_run())
    return {"made": made["all"], "calls": calls, "cold": colds, "processor": processor()}


def table(found: dict[str, Any]) -> str:
    """Return a line for each side."""
    cold_run, calls = statistics.median(found["cold"]), found["calls"]
    rows: list[Row] = [("what", "seconds", "of a cold run")]
    for name, seconds in (
        ("main.py, cold", cold_run),
        ("Evaluator, made", found["made"]),
        ("a call after the first", statistics.median(calls["sample"][1:])),
        ("the same, whole_tokens=None", statistics.median(calls["all"][1:])),
    ):
        rows.append((name, f"{seconds:.2f}", f"{seconds / cold_run:.3f}"))
    return f"{aligned(rows)}\n\n({found['processor']})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run"], help="measure first")
    parser.add_argument("--repeats", type=int, default=3, help="cold runs (%(default)s)")
    args = parser.parse_args()
    if args.what == "run":
        result_file.write_json(KEPT, {**measure(args.repeats), "_run": result_file.describe_run({})})
    print(table(json.loads(KEPT.read_text("utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
