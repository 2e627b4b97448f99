"""Compare the k-sparse probes of `sae-probes` 0.4.2 with ours, on that package's split of ten of its tasks.

python -m benchmarks.k_sparse_agreement run --environment ~/sae-probes  # run the package; creates the environment
python -m benchmarks.k_sparse_agreement                                 # print the table of the kept results

Rows are used as shipped (with duplicates), with BOS first (as TransformerLens does), the last token, and layer 3 of the
bundled model. Our side uses the functions that choose latents and fit probes (`delta_selectivity/probing/k_sparse.py`)
on the 1024 training rows of `sae-probes`, at the C that `sae-probes` chose on the last 100 of them. In a run of this
program, C is chosen on the other folds.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.metrics import accuracy_score, roc_auc_score

from benchmarks.bench_end_to_end import DRIVER, SAE, make_environment
from benchmarks.bundled import MODEL
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.probing.k_sparse import best_latents, decision_scores, fit_batched
from delta_selectivity.reporting import tables
from delta_selectivity.saes import open_sae
from delta_selectivity.tasks import data_wheel

KEPT = Path(__file__).with_suffix(".json")
LAYER = 3
TASKS = (
    "105_click_bait", "114_nyc_borough_Manhattan", "117_us_state_FL", "120_us_timezone_Chicago",
    "123_world_country_United_Kingdom", "126_art_type_book", "127_art_type_song", "130_temp_cat_Frequency",
    "133_context_type_Causality", "154_athlete_sport_football",
)  # fmt: skip
SEED, TRAINING, TESTED = 42, 1024, 100  # at least this many


class Line(NamedTuple):
    """One task and k, on the package's test rows."""

    task: str
    k: int
    overlap: int  # number of latents that both chose
    auc: float
    their_auc: float
    accuracy: float
    their_accuracy: float


class Split(NamedTuple):
    """Row indices of a task, in the package's order."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]


def theirs() -> dict[str, list[dict[str, Any]]]:
    """Return the kept figures of the package: task -> figures for each k."""
    figures: dict[str, list[dict[str, Any]]] = json.loads(KEPT.read_text(encoding="utf-8"))
    return figures


def compared(tasks: Sequence[str]) -> Iterator[Line]:
    """Compare both programs, by task and k."""
    kept, sae = theirs(), open_sae(str(SAE)).load(LAYER, "cpu")
    for task in tasks:
        texts, labels = read(task)
        split, codes = split_of(labels), sae.encode(last_tokens(texts)).to_csr()
        parts = (codes.values().double(), codes.col_indices(), codes.crow_indices())
        latents = csr_array(tuple(part.numpy() for part in parts), shape=tuple(codes.shape))
        weight = np.zeros((1, len(labels)))
        weight[0, split.train] = 1
        chosen = best_latents(latents, labels, weight, max(one["k"] for one in kept[task]))[0]
        for one in kept[task]:
            own = chosen[: one["k"]]
            scores = scores_of_test(latents[:, own].toarray(), labels, split, one["C"])
            known = labels[split.test]
            yield Line(
                task, one["k"], len(np.intersect1d(own, one["indices"])),
                float(roc_auc_score(known, scores)), one["test_auc"],
                float(accuracy_score(known, scores > 0)), one["test_acc"],
            )  # fmt: skip


def read(task: str) -> tuple[list[str], NDArray[np.bool_]]:
    """Read the texts of a task as shipped, and whether each is of the class that sorts last."""
    import zstandard

    with data_wheel.open_data(f"sae_probes/data/cleaned_data/{task}.csv.zst") as file:
        content = zstandard.ZstdDecompressor().stream_reader(file).read().decode()
    rows = list(csv.DictReader(io.StringIO(content, newline="")))
    return [row["prompt"] for row in rows], np.unique([row["target"] for row in rows], return_inverse=True)[1] == 1


def split_of(labels: NDArray[np.bool_]) -> Split:
    """Draw the package's split: training rows, half of each class, then test rows likewise from the rest."""
    random = np.random.RandomState(SEED)
    n_train = min(len(labels) - TESTED, TRAINING)
    left, parts = [np.flatnonzero(labels), np.flatnonzero(~labels)], []
    for size in (n_train, len(labels) - n_train - 1):
        sizes = (size - size // 2, size // 2)
        drawn = [random.choice(rows, n, replace=False) for rows, n in zip(left, sizes, strict=True)]
        left = [np.setdiff1d(rows, taken) for rows, taken in zip(left, drawn, strict=True)]
        parts.append(drawn)
    return Split(*(random.permutation(np.concatenate(drawn)) for drawn in parts))


def last_tokens(texts: Sequence[str]) -> torch.Tensor:
    """Return the activations [texts, d] at the last token of each text, with BOS first."""
    info, site = open_model(str(MODEL)), Site(LAYER, "resid_post")
    model = info.load([site], "cpu", "float32")
    ids = [[info.opening_token_id, *tokens] for tokens in info.tokenizer(list(texts))["input_ids"]]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    activations = torch.empty(len(ids), info.d_model)
    for start in range(0, len(order), 128):
        some = order[start : start + 128]
        batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in some], batch_first=True)
        last = torch.tensor([len(ids[i]) - 1 for i in some])
        activations[some] = model.activations(batch)[site][torch.arange(len(some)), last]
    return activations


def scores_of_test(x: NDArray[np.float64], labels: NDArray[np.bool_], split: Split, c: float) -> NDArray[np.float64]:
    """Return the scores of the test rows by a probe on x [rows, k]."""
    rows, known = torch.from_numpy(x[split.train])[None], torch.from_numpy(labels[split.train])
    fit = fit_batched(rows, known, torch.ones(1, len(split.train), dtype=torch.float64), (c,))
    return decision_scores(torch.from_numpy(x[split.test])[None], fit.theta)[0, 0].numpy()


def run(environment: Path) -> None:
    """Run the package on the ten tasks, and keep its figures."""
    command = [str(make_environment(environment)), str(DRIVER), str(MODEL), str(SAE), "--figures"]
    command += ["--hooks", str(LAYER), "--tasks", ",".join(TASKS)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=offline)
    output = json.loads(done.stdout)
    lines = [f"{json.dumps(task)}: [\n{_lines(by_k)}\n]" for task, by_k in output.items()]
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _lines(by_k: Sequence[dict[str, Any]]) -> str:
    return ",\n".join(f" {json.dumps(one)}" for one in by_k)


def table() -> str:
    """Return the largest differences by k, over the tasks."""
    found = list(compared(TASKS))
    rows = [("k", "tasks", "mean AUC", "largest difference of AUC", "of accuracy", "latents in common")]
    for k in sorted({line.k for line in found}):
        of_k = [line for line in found if line.k == k]
        auc = max(abs(line.auc - line.their_auc) for line in of_k)
        accuracy = max(abs(line.accuracy - line.their_accuracy) for line in of_k)
        same, mean = (
            sum(line.overlap for line in of_k) / (k * len(of_k)),
            sum(line.their_auc for line in of_k) / len(of_k),
        )
        rows.append((str(k), str(len(of_k)), f"{mean:.3f}", f"{auc:.4f}", f"{accuracy:.4f}", f"{same:.3f}"))
    return tables.aligned(rows)


def main() -> int:
    """Run the package, or print the table."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("what", nargs="?", choices=("run",), help="run the package again; otherwise print the table")
    flags.add_argument("--environment", type=Path, help="folder of the package's environment; created if missing")
    args = flags.parse_args()
    if args.what == "run":
        if args.environment is None:
            flags.error("run needs --environment")
        run(args.environment)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
