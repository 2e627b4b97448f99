"""model_sel and sae_sel of a file of rows by a plain loop over scikit-learn, beside what the program says of it.

python activations.py --model_name smollm2-135m --sae_name assets/smollm2-saes/topk-k32 --layers 15 \\
    --datasets gender,is_alive,politics --shuffle_select_n 1000 -o rows.safetensors
python -m benchmarks.independent rows.safetensors       # exit 1 if a figure differs by more than 0.005

The file is read by safetensors alone, and the probes are `benchmarks/serial.py`'s: one `LogisticRegression` for each
fold, view and C. Shared with the program are the definitions (docs/numbers.md) and the folds, which are checked here.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file
from sklearn.exceptions import ConvergenceWarning

from benchmarks import serial
from delta_selectivity import Settings, probe_selectivity
from delta_selectivity.probing.folds import FoldPlan

ALLOWED = 0.005


class Compared(NamedTuple):
    """One figure, computed by both programs."""

    probe: str
    sae: str
    figure: str
    program: float
    scikit_learn: float

    @property
    def difference(self) -> float:
        return self.program - self.scikit_learn


def compare(path: Path, repeats: int) -> list[Compared]:
    """Compare every probe of every SAE in the file, on this many partitions into folds."""
    content, found = load_file(path), []
    settings = Settings(repeats=repeats)
    for column in sorted(name for name in content if name.startswith("labels.")):
        labels = content[column]
        part = labels >= 0
        x, labels, persons = content["x"][part], labels[part] == 1, content["groups"][part]
        folds = FoldPlan.build(labels[None], persons, None, settings.folds, repeats, settings.seed).folds
        _check_folds(folds, persons)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            own = np.mean([serial.selectivity(x, x, labels, persons, of_repeat) for of_repeat in folds])
            for name in sorted(name for name in content if name.startswith("recon.")):
                recon = content[name][part]
                theirs = np.mean([serial.selectivity(x, recon, labels, persons, of_repeat) for of_repeat in folds])
                said = probe_selectivity(x, recon, labels, persons, settings=settings)
                where = column.removeprefix("labels."), name.removeprefix("recon.")
                found.append(Compared(*where, "model_sel", said.model_sel, float(own)))
                found.append(Compared(*where, "sae_sel", said.sae_sel, float(theirs)))
    return found


def _check_folds(folds: np.ndarray, persons: np.ndarray) -> None:
    """Check that no person is in two folds of a partition."""
    for of_repeat in folds:
        pairs = {(int(person), int(fold)) for person, fold in zip(persons, of_repeat, strict=True)}
        assert len(pairs) == len(np.unique(persons))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="file of `activations.py -o`, .safetensors")
    parser.add_argument("--repeats", type=int, default=2, help="partitions into folds; the program has 5")
    args = parser.parse_args()
    found = compare(args.rows, args.repeats)
    print("| probe | SAE | figure | program | scikit-learn | difference |\n|---|---|---|---|---|---|")
    for each in found:
        print(
            f"| {each.probe} | {each.sae} | {each.figure} | {each.program:.4f} | {each.scikit_learn:.4f} | "
            f"{each.difference:+.4f} |"
        )
    return int(any(abs(each.difference) > ALLOWED for each in found))


if __name__ == "__main__":
    sys.exit(main())
