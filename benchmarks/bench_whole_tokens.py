"""Compare whole-text figures of a sample of the tokens with those of all tokens: their time and their coverage.

python -m benchmarks.bench_whole_tokens run               # ten SAEs of 16k latents at one layer, warm cache
python -m benchmarks.bench_whole_tokens                   # print the table of the kept results
python -m benchmarks.bench_whole_tokens run --coverage    # the bundled SAEs, twenty samples
python -m benchmarks.bench_whole_tokens --coverage        # print the table of the coverage

Speed: whole runs of `main.py`, each timed from start to end, in turn; figures are medians. Coverage: samples by seed,
of a quarter of the default size, on every dataset, compared with the figures of all tokens. A figure is covered if it
differs from that of all tokens by at most 1.96 standard errors. `dead` falls with the number of tokens, so it is
compared with the mean of the samples.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas

from benchmarks.bundled import MODEL
from benchmarks.shapes import Shape
from benchmarks.timing import parser, show_or_measure
from delta_selectivity import Results, Settings, evaluate
from delta_selectivity.reporting import tables

PROJECT = Path(__file__).resolve().parent.parent
SAES = [str(MODEL.parent / f"tiny-pythia-saes-k{k}") for k in (8, 32)]
N_LAYERS, LAYER, N_SAES, D_SAE, K = 6, 3, 10, 16_384, 32
DATASET = "occupation"
SAMPLE, SEEDS = 16_384, 20
SPEED_HEADER = ("tokens", "in whole-text figures", "whole job, s", "ratio", "figures within 2 standard errors")
COVERAGE_HEADER = ("figure", "samples", "mean standard error", "spread of the samples", "within 1.96 standard errors")


def speed(args: argparse.Namespace) -> list[tables.Row]:
    """Time ten wide SAEs at one layer, with a cache that holds everything about the model."""
    n_saes, d_sae, more = (2, 512, ["--shuffle_select_n", "60"]) if args.quick else (N_SAES, D_SAE, [])
    shape = Shape("wide", N_LAYERS, 256, 4, d_sae, K)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for i in range(n_saes):
            shape.write_saes(place / "saes" / str(i), seed=i)

        def run(tokens: str, turn: int) -> float:
            command = [
                sys.executable, str(PROJECT / "main.py"), "--model_name", str(MODEL), "--sae_name", f"{place}/saes/*",
                "--layers", str(LAYER), "--datasets", DATASET, "--cache_dir", str(place / "cache"), "--force",
                "--whole_tokens", tokens, "--output_directory", str(place / f"{tokens}-{turn}"), "--quiet", *more,
            ]  # fmt: skip
            start = time.perf_counter()
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            return time.perf_counter() - start

        sides = ("all", "500" if args.quick else "65536")
        run(sides[0], 0)  # fill the cache, with all tokens: the sample's are among them
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(1, args.repeats + 1):
            for side in sides:
                seconds[side].append(run(side, turn))
        frames = {side: _frame(place / f"{side}-1") for side in sides}
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    exact, sampled = frames.values()
    distance = (sampled["fvu_whole"] - exact["fvu_whole"]).abs() / sampled["fvu_whole_se"]
    within = f"{int((distance < 2).sum())} of {len(distance)}"
    return [
        SPEED_HEADER,
        *(
            (
                side,
                f"{int(frames[side]['n_tokens'].iloc[0]):,}",
                f"{medians[side]:.1f}",
                f"{medians['all'] / medians[side]:.1f}x",
                "" if side == "all" else within,
            )
            for side in sides
        ),
    ]


def coverage(args: argparse.Namespace) -> list[tables.Row]:
    """Measure the bundled SAEs at one layer, on all datasets."""
    seeds, sample, rows = (2, 500, 60) if args.quick else (SEEDS, SAMPLE, None)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def figures(seed: int, tokens: int | None) -> dict[str, np.ndarray]:
            settings = Settings(
                folds=3, repeats=1, seed=seed, whole_tokens=tokens, shuffle_select_n=rows if args.quick else None
            )
            out = place / f"{seed}-{tokens}"
            evaluate(MODEL, SAES, layers=[LAYER], settings=settings, output=out, cache=place / "cache", device="cpu")
            return _frame(out).sort_values(["sae", "dataset"]).to_dict("list")

        exact = figures(0, None)
        samples = [figures(seed, sample) for seed in range(seeds)]
    table: list[tables.Row] = [COVERAGE_HEADER]
    for name in ("mse_whole", "fvu_whole", "dead"):
        values = np.array([one[name] for one in samples])
        errors = np.array([one[f"{name}_se"] for one in samples])
        centre = values.mean(axis=0) if name == "dead" else np.array(exact[name])
        within = np.abs(values - centre) <= 1.96 * errors
        spread = np.sqrt(np.square(values - centre).mean())
        shares = (f"{errors.mean():.2g}", f"{spread:.2g}", f"{100 * within.mean():.1f} %")
        table.append((name, str(values.size), *shares))
    return table


def _frame(folder: Path) -> pandas.DataFrame:
    frame = Results.load(folder).to_frame()
    return frame.drop_duplicates(["sae", "dataset", "layer"])


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument(
        "--coverage", action="store_true", help="measure how often the intervals cover the figures of all tokens"
    )
    args = flags.parse_args()
    if args.coverage:
        print(show_or_measure("bench_whole_tokens_coverage", args, lambda: coverage(args)))
    else:
        print(show_or_measure("bench_whole_tokens", args, lambda: speed(args)))


if __name__ == "__main__":
    main()
