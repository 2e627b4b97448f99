"""Compare candidate scores for ranking SAEs with `transfer_r2`, on stored out-of-fold scores.

python -m benchmarks.headline results/reliability/layer_3/scores/panel_3000   # of `benchmarks/reliability.py run`
python -m benchmarks.headline                                                 # print the table of the kept results
python -m benchmarks.headline --model_name smollm2-135m [FOLDER]              # the same for the study on SmolLM2
python -m scripts.update_tables docs/reliability.md                           # update the document

docs/reliability.md defines each candidate, the expectations, and the rule for choosing one; it was written before any
candidate was computed. No model, SAE or fit is needed: all candidates use the scores of the model's own probes on its
activations (view `model`) and on the reconstructions (view `transfer`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from benchmarks.paired_scores import PairCount, Parts, difference
from benchmarks.sae_families import STUDIES, TINY_PYTHIA
from benchmarks.sae_panel import PairSet, pair_sets
from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import ProbeScores, correct, r2_parts
from delta_selectivity.probing.uncertainty import balanced_mean
from delta_selectivity.records import scores
from delta_selectivity.system.whole_file import replacing

KEPT = Path(__file__).resolve().with_name("headline")  # one file for each model
BEST_SO_FAR = "transfer_r2"
MIN_GAIN = (11, 10)  # at least a tenth more pairs are ordered correctly and significantly

Floats = NDArray[np.floating]
Counts = dict[str, dict[str, dict[str, PairCount]]]  # family -> kind of pairs -> candidate -> its count


def _scores(probe: ProbeScores) -> tuple[Floats, Floats]:
    """Return the scores of the model's probes on x and on x̂: [repeats, rows] each."""
    return probe.views["model"].astype(np.float64), probe.views["transfer"].astype(np.float64)


def _mean(probe: ProbeScores, values: Floats) -> Floats:
    """Return the mean with balanced classes: [repeats, 1]."""
    return np.asarray(balanced_mean(values, probe.labels, probe.weights))[:, None]


def margin_parts(probe: ProbeScores, _view: str) -> Floats:
    """Return the influence by row of the separation of the classes on x̂ divided by that on x (a linearised ratio)."""
    own, copy = (np.where(probe.labels, of_view, -of_view) for of_view in _scores(probe))
    whole = _mean(probe, own)
    share = _mean(probe, copy) / whole
    return np.asarray(share + (copy - share * own) / whole)


def bits_parts(probe: ProbeScores, _view: str) -> Floats:
    """Return the information about the label in x̂ minus that in x, in bits, after Platt scaling on the other folds."""
    own, copy = (_platt_bits(probe, of_view) for of_view in _scores(probe))
    return copy - own


def _platt_bits(probe: ProbeScores, of_view: Floats) -> Floats:
    """Return 1 - log loss / ln 2 of each row: [repeats, rows]."""
    result = np.empty_like(of_view)
    for values, folds, out in zip(of_view, probe.folds, result, strict=True):
        for fold in np.unique(folds):
            here = folds == fold
            slope, offset = fit_platt(values[~here], probe.labels[~here], probe.weights[~here])
            logits = slope * values[here] + offset
            out[here] = 1 - np.logaddexp(0, np.where(probe.labels[here], -logits, logits)) / np.log(2)
    return result


def fit_platt(values: Floats, labels: NDArray[np.bool_], weights: Floats, steps: int = 30) -> tuple[float, float]:
    """Fit slope and offset of a logistic regression on one score, with balanced classes, by Newton's method."""
    weights = np.where(labels, weights / weights[labels].sum(), weights / weights[~labels].sum())
    scale = values.std() or 1.0
    x = np.stack([values / scale, np.ones_like(values)])  # [2, rows]
    beta = np.zeros(2)

    def loss(at: Floats) -> float:
        logits = at @ x
        return float(weights @ np.logaddexp(0, np.where(labels, -logits, logits)))

    for _ in range(steps):
        p = expit(beta @ x)
        hessian = (x * (weights * p * (1 - p))) @ x.T + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, x @ (weights * (labels - p)))
        while loss(beta + step) > loss(beta) and np.abs(step).max() > 1e-10:
            step = step / 2
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            break
    return float(beta[0] / scale), float(beta[1])


def belief_parts(probe: ProbeScores, _view: str) -> Floats:
    """Return minus the divergence of the probe's probabilities on x̂ from those on x, KL(σ(s) ‖ σ(t)), in bits."""
    own, copy = _scores(probe)
    p = expit(own)
    rise = np.logaddexp(0, -copy) - np.logaddexp(0, -own)
    fall = np.logaddexp(0, copy) - np.logaddexp(0, own)
    return np.asarray(-(p * rise + (1 - p) * fall) / np.log(2))


def rank_parts(probe: ProbeScores, _view: str) -> Floats:
    """Return the squared correlation of the scores on x̂ with those on x, linearised."""
    own, copy = (_standardised(probe, of_view) for of_view in _scores(probe))
    r = _mean(probe, own * copy)
    return np.asarray(r**2 + 2 * r * (own * copy - r * (own**2 + copy**2) / 2))


def _standardised(probe: ProbeScores, of_view: Floats) -> Floats:
    centred = of_view - _mean(probe, of_view)
    return centred / np.sqrt(np.maximum(_mean(probe, centred**2), np.finfo(np.float64).tiny))


def answer_parts(probe: ProbeScores, _view: str) -> Floats:
    """Return 1 where the probe predicts the same class on x̂ as on x."""
    own, copy = _scores(probe)
    return ((own > 0) == (copy > 0)).astype(np.float64)


CANDIDATES: dict[str, Parts] = {  # name -> contribution of each row; higher is better
    BEST_SO_FAR: lambda found, _view: r2_parts(found, "transfer"),
    "margin kept": margin_parts,
    "bits kept": bits_parts,
    "belief kept": belief_parts,
    "rank kept": rank_parts,
    "answers kept": answer_parts,
    "transfer_delta": lambda found, _view: correct(found, "transfer") - correct(found, "model"),
    "delta_sel": lambda found, _view: correct(found, "sae") - correct(found, "model"),
}
EXCLUDED = ("transfer_delta", "delta_sel")  # already in the results


def measure(folder: Path, sets: Sequence[PairSet]) -> Counts:
    """Measure how each candidate orders the pairs. Raises `RequestError` if the scores of an SAE are missing."""
    names = {snapshot.name for each in sets for pair in each.pairs for snapshot in pair}
    probes = {name: list(scores.load(folder / f"{name}.safetensors").probes.values()) for name in sorted(names)}
    gains: dict[tuple[str, str, str], list[tuple[float, float, float]]] = {}
    for candidate, parts in CANDIDATES.items():
        shares = {name: [parts(probe, "") for probe in of_sae] for name, of_sae in probes.items()}
        for each in sets:
            estimates = (
                difference(shares[better], shares[worse], probes[better], level_varies=candidate not in EXCLUDED)
                for worse, better in each.names
            )
            row = [(gain.value, gain.low, gain.high) for gain in estimates]
            gains.setdefault((each.family, each.kind, candidate), []).extend(row)
    counts: Counts = {}
    for (family, kind, candidate), values in gains.items():
        counts.setdefault(family, {}).setdefault(kind, {})[candidate] = PairCount.of(values, noise=np.inf)
    return counts


def total(by_kind: Mapping[str, Mapping[str, PairCount]], candidate: str) -> tuple[int, int]:
    """Return the pairs ordered correctly, and those ordered wrongly, with significance, over all kinds of pairs."""
    found = [of[candidate] for of in by_kind.values()]
    return sum(count.sure for count in found), sum(count.sure_and_wrong for count in found)


def verdict(counts: Counts) -> str:
    """Say which candidate the first family chooses, and whether it clearly beats `transfer_r2` on the second."""
    first, second = counts
    candidates = [name for name in CANDIDATES if name not in (BEST_SO_FAR, *EXCLUDED)]

    def merit(name: str) -> tuple[int, int]:
        right, wrong = total(counts[first], name)
        return right, -wrong

    chosen = max(candidates, key=merit)
    (right, wrong), (bar, bar_wrong) = (total(counts[second], name) for name in (chosen, BEST_SO_FAR))
    more, than = MIN_GAIN
    beats = than * right >= more * bar and wrong <= bar_wrong
    return (
        f"Chosen on {first}: {chosen}. On {second} it orders {right} pairs surely right and {wrong} surely wrong, "
        f"{BEST_SO_FAR} {bar} and {bar_wrong}: {'it is added' if beats else f'{BEST_SO_FAR} stays the headline'}."
    )


def table(counts: Counts) -> str:
    """Return rows of candidates and columns of kinds of pairs of both families: correct / wrong, with significance."""

    def cells(of_candidate: Callable[[Mapping[str, PairCount]], str]) -> Iterable[str]:
        return (of_candidate(by) for by_kind in counts.values() for by in by_kind.values())

    def title(family: str, kind: str) -> str:
        return f"{family}: {kind} (of {next(iter(counts[family][kind].values())).pairs})"

    head = ["candidate", *(title(family, kind) for family, by_kind in counts.items() for kind in by_kind)]
    rows = [
        [name, *cells(lambda by, name=name: f"{by[name].sure} / {by[name].sure_and_wrong}")]  # type: ignore[misc]
        for name in CANDIDATES
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def keep(counts: Counts, model_name: str) -> None:
    """Write the counts into the repository."""
    KEPT.mkdir(exist_ok=True)
    plain = {
        family: {
            kind: {name: [count.pairs, count.right, count.sure, count.sure_and_wrong] for name, count in by.items()}
            for kind, by in by_kind.items()
        }
        for family, by_kind in counts.items()
    }
    with replacing(KEPT / f"{model_name}.json", "w", encoding="utf-8") as file:
        json.dump(plain, file, indent=1)
        file.write("\n")


def kept(model_name: str) -> Counts:
    """Return the kept counts of a model."""
    plain = json.loads((KEPT / f"{model_name}.json").read_text(encoding="utf-8"))
    counts: Counts = {}
    for family, by_kind in plain.items():
        for kind, by in by_kind.items():
            found = {name: PairCount(pairs, right, sure, wrong, 0) for name, (pairs, right, sure, wrong) in by.items()}
            counts.setdefault(family, {})[kind] = found
    return counts


def main() -> int:
    """Measure if a folder is given, and print the kept results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", type=Path, help="folder of stored scores, one file for each SAE of the panel"
    )
    parser.add_argument("--model_name", choices=STUDIES, default=TINY_PYTHIA.model_name, help="model of the study")
    args = parser.parse_args()
    if args.folder is not None:
        try:
            keep(measure(args.folder, pair_sets(STUDIES[args.model_name])), args.model_name)
        except RequestError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    counts = kept(args.model_name)
    print(f"{table(counts)}\n\n{verdict(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
