"""Test whether the bundled model knows anything: compare its model_sel with that of the same model with random weights.

python -m benchmarks.random_control run   # measure the random model (minutes)
python -m benchmarks.random_control       # print the table, from results/demo/ and the results of `run`
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from delta_selectivity.reporting import results as report_files
from delta_selectivity.reporting import tables

PROJECT = Path(__file__).resolve().parent.parent

MODEL = PROJECT / "assets" / "tiny-pythia"
SAES = PROJECT / "assets" / "tiny-pythia-saes-k8"  # main.py needs an SAE; model_sel does not depend on it
TRAINED = PROJECT / "results" / "demo" / SAES.name
KEPT = Path(__file__).resolve().with_suffix("")  # folder beside this file
MIDDLE_LAYER = 4


def run() -> None:
    """Measure the same architecture with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tiny-pythia-random"
        shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("model*"))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL))
        model.to(torch.bfloat16).save_pretrained(folder)
        flags = ["--model_name", folder.name, "--sae_name", str(SAES), "--output_directory", str(KEPT), "--overwrite"]
        subprocess.run([sys.executable, str(PROJECT / "main.py"), *flags], cwd=temporary, check=True)


def selectivities(folder: Path) -> dict[str, dict[int, tuple[float, int]]]:
    """Return probe -> layer -> (model_sel, rows)."""
    found: dict[str, dict[int, tuple[float, int]]] = {}
    for _, results in report_files.load(report_files.result_files(folder)):
        for layer, probe, _, cell in report_files.cells(results):
            found.setdefault(probe, {})[layer] = (cell["model_sel"], cell["n_rows"])
    return found


def table() -> str:
    """Return, per probe, the mean over layers and one middle layer, trained and random, and how many improve."""
    trained, random = selectivities(TRAINED), selectivities(KEPT)
    rows: list[tables.Row] = [
        ("probe", "rows", "trained, mean", "random, mean", f"trained, layer {MIDDLE_LAYER}", "random")
    ]
    gains = 0
    for probe, layers in sorted(trained.items()):
        pair = [statistics.fmean(value for value, _ in source[probe].values()) for source in (trained, random)]
        gains += pair[0] > pair[1]
        at_middle = [source[probe][MIDDLE_LAYER][0] for source in (trained, random)]
        rows.append((probe, str(layers[MIDDLE_LAYER][1]), *(f"{value:.3f}" for value in (*pair, *at_middle))))
    tokens = json.loads((MODEL / "training.json").read_text(encoding="utf-8"))["tokens_seen"] / 1e6
    verdict = f"Trained on {tokens:.1f} M tokens; it beats random weights on {gains} of {len(trained)} probes (means)."
    return f"{tables.aligned(rows)}\n\n{verdict}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run"], help="measure the random model first")
    if parser.parse_args().what == "run":
        run()
    print(table())
