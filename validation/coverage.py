"""Do the intervals cover the truth, and does the test find differences where there are none?

    for rates in measure_settings(SETTINGS, repeats=500, seed=0, workers=2):
        rates.covered, rates.false_positives_equal

Every repeat draws new people from a `GaussianWorld`, and three views of them: the model's, a `worse` one with more
noise, and an `equal` one with as much, drawn anew. Another label is random by person, with folds of its own:
stratified together with the trait, it would inherit what the two share by chance on both sides of every split. So in
each repeat there is a difference to cover (model and worse, on the trait), and two that are not there: model and
equal on the trait, and model and worse on the random label.

**The truth.** delta_sel estimates what probes fitted on so many people would score on all other people: an
expectation over the draw of the people and over the partitions. A Gaussian world gives each fitted probe's true
balanced accuracy in closed form. `Rates.truth` is the mean over all repeats of the true difference of the very probes
of each repeat; `covered` is the share of intervals that hold it. `covered_own` is the share that hold the true
difference of their own repeat's probes, which is what to expect of these probes on new people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import bdtr

from delta_selectivity.probing.backends.problem import Path
from delta_selectivity.probing.folds import FoldPlan, Skipped
from delta_selectivity.probing.probe_statistics import correct
from delta_selectivity.probing.probes import ProbeBackend, ProbeFits, ProbeProblem, choose_backend
from delta_selectivity.probing.selectivity import (
    DEFAULT_CS,
    ModelFit,
    OutOfFold,
    ProbeResult,
    fit_model,
    measure,
    out_of_fold,
)
from validation.table import Row, judged, reported
from validation.world import GaussianWorld, one_large, zipf

COVERAGE = (0.93, 0.985)
FALSE_POSITIVES = 0.069  # of 500; a test at level 0.05 stays below this with 97.5 % probability
NULL_BIAS = 0.005
LEVEL = 0.05


@dataclass(frozen=True)
class Setting:
    """A world and its views."""

    name: str
    world: GaussianWorld  # of one trait
    model_noise: float = 0.25  # variance in every coordinate of the noise that the model's view and the equal view add
    worse_noise: float = 2.25
    judges_null_sel: bool = True  # of few people it is told alone


SETTINGS = (
    Setting("600 people, weak", GaussianWorld(600, (1, 1), 32, (0.3,))),
    Setting("600 people, strong", GaussianWorld(600, (1, 1), 32, (1.5,))),
    Setting("2000 people, weak", GaussianWorld(2000, (1, 1), 32, (0.3,))),
    Setting("2000 people, strong", GaussianWorld(2000, (1, 1), 32, (1.5,))),
    Setting("250 people x 5-10, weak", GaussianWorld(250, (5, 10), 32, (0.3,), person_share=0.5)),
    Setting("250 people x 5-10, strong", GaussianWorld(250, (5, 10), 32, (1.5,), person_share=0.5)),
)


def _few(name: str, sizes: tuple[int, ...], signal: float = 1.0) -> Setting:
    world = GaussianWorld(len(sizes), (1, 1), 16, (signal,), person_share=0.5, sizes=sizes)
    return Setting(name, world, judges_null_sel=False)


FEW_OR_UNEQUAL = (
    _few("12 people x 8", (8,) * 12),
    _few("20 people x 5", (5,) * 20),
    _few("50 people x 4", (4,) * 50),
    _few("12 people, Zipf", zipf(12, 100)),
    _few("50 people, Zipf", zipf(50, 300)),
    _few("12 people, one of 30 %", one_large(12, 100, 0.3)),
    _few("50 people, one of 30 %", one_large(50, 200, 0.3)),
)


@dataclass(frozen=True)
class Repeat:
    """Results of one draw."""

    delta: float  # of the worse view
    low: float
    high: float
    own_truth: float  # the true difference of this repeat's probes, mean over folds and partitions
    p_equal: float  # of model and equal view, on the trait
    p_random: float  # of model and worse view, on the random label
    by_row_equal: float  # p of McNemar's test in the first partition, as if rows were independent
    by_row_random: float
    random_model_sel: float  # balanced accuracy on the random label, after choosing C
    random_sae_sel: float
    model_sel: float
    model_low: float
    model_high: float
    own_model_truth: float  # the true model_sel of this repeat's probes


@dataclass(frozen=True)
class Rates:
    """Rates over the repeats of a setting, and means over them."""

    setting: str
    repeats: int
    model_sel: float
    truth: float
    mean_delta: float
    covered: float
    covered_own: float
    false_positives_equal: float
    false_positives_random: float
    by_row_equal: float
    by_row_random: float
    random_sel: float  # the mean of the two views that is farther from 1/2
    covered_model: float  # shares of the intervals of model_sel that hold its truth
    judges_null_sel: bool = True

    def rows(self) -> list[Row]:
        """Return the rows of the table. With fewer than 500 repeats, the binomial error widens the required range."""
        slack = 2 * max(0.0, 1 / np.sqrt(self.repeats) - 1 / np.sqrt(500))
        low, high = (
            edge + sign * slack * np.sqrt(edge * (1 - edge)) for edge, sign in zip(COVERAGE, (-1, 1), strict=True)
        )
        most = FALSE_POSITIVES + slack * np.sqrt(LEVEL * (1 - LEVEL))
        bias = NULL_BIAS * np.sqrt(max(1.0, 500 / self.repeats))
        where = f"{self.setting} ({self.repeats} repeats)"
        return [
            reported(
                where,
                "known truth",
                f"model_sel; truth {self.truth:+.4f}, mean of estimates {self.mean_delta:+.4f}",
                self.model_sel,
            ),
            judged(
                where,
                "known truth",
                "95 % intervals that cover it",
                self.covered,
                round(low, 3),
                min(round(high, 3), 1),
            ),
            reported(where, "known truth", "that cover their own probes' truth", self.covered_own),
            reported(where, "known truth", "95 % intervals of model_sel that cover its truth", self.covered_model),
            judged(where, "equal views", "false positives", self.false_positives_equal, high=round(most, 3)),
            reported(where, "equal views", "false positives of McNemar's test by row", self.by_row_equal),
            judged(where, "null labels", "false positives", self.false_positives_random, high=round(most, 3)),
            reported(where, "null labels", "false positives of McNemar's test by row", self.by_row_random),
            reported(where, "null labels", "mean sel", self.random_sel, digits=4)
            if not self.judges_null_sel
            else judged(
                where, "null labels", "mean sel", self.random_sel, round(0.5 - bias, 4), round(0.5 + bias, 4), digits=4
            ),
        ]


@dataclass
class KeepsFits:
    """A probe backend that remembers its last fits, because the metric does not return the SAE's coefficients."""

    backend: ProbeBackend
    last: ProbeFits | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return self.backend.name

    def fit(self, problem: ProbeProblem, path: Path | None = None) -> ProbeFits:
        self.last = self.backend.fit(problem, path)
        return self.last


def measure_settings(settings: Sequence[Setting], repeats: int, seed: int, workers: int = 1) -> Iterator[Rates]:
    """Draw and measure each setting `repeats` times; rates do not depend on the number of `workers` (processes)."""
    with _mapping(workers) as mapped:
        for setting in settings:
            tasks = [(setting, seed, number) for number in range(repeats)]
            yield summarise(setting, list(mapped(_numbered, tasks)))


def measure_once(setting: Setting, seed: int, number: int) -> Repeat:
    """Do one repeat; deterministic by `seed` and `number`."""
    random = np.random.default_rng([seed, number])
    world, backend = setting.world, KeepsFits(choose_backend("torch", "cpu")[0])
    rows = world.sample(random)
    coin = random.permutation(world.people) % 2 == 0

    def view(noise: float) -> torch.Tensor:
        added = np.sqrt(noise) * world.noise(random, rows.persons)
        return rows.x + torch.from_numpy(added.astype(np.float32))

    x, equal, worse = (view(noise) for noise in (setting.model_noise, setting.model_noise, setting.worse_noise))
    plan, random_plan = (
        FoldPlan.build(label[None], rows.persons, None, 5, 5, number) for label in (rows.labels[0], coin[rows.persons])
    )
    on_random = out_of_fold(random_plan, fit_model(random_plan, x, backend), worse, backend)
    model = fit_model(plan, x, backend)
    on_equal = out_of_fold(plan, model, equal, backend)
    lost = out_of_fold(plan, model, worse, backend)
    model_truth = _true_model_sel(world, model, setting.model_noise)
    truth = _true_sel(world, backend, lost, setting.worse_noise) - model_truth
    result, alike, null = (_only(measure(found)) for found in (lost, on_equal, on_random))
    return Repeat(
        delta=result.delta_sel,
        low=result.ci_low,
        high=result.ci_high,
        own_truth=truth,
        p_equal=alike.p_value,
        p_random=null.p_value,
        by_row_equal=mcnemar(on_equal),
        by_row_random=mcnemar(on_random),
        random_model_sel=null.model_sel,
        random_sae_sel=null.sae_sel,
        model_sel=result.model_sel,
        model_low=result.model_ci_low,
        model_high=result.model_ci_high,
        own_model_truth=model_truth,
    )


def summarise(setting: Setting, found: list[Repeat]) -> Rates:
    """Return the rates over the repeats of a setting."""
    each = {f.name: np.array([getattr(repeat, f.name) for repeat in found]) for f in fields(Repeat)}
    truth, model_truth = (float(each[name].mean()) for name in ("own_truth", "own_model_truth"))

    def covered(value: NDArray[np.float64] | float) -> float:
        return float(np.mean((each["low"] <= value) & (value <= each["high"])))

    def rejected(name: str) -> float:
        return float(np.mean(each[name] < LEVEL))

    return Rates(
        setting=setting.name,
        repeats=len(found),
        model_sel=float(each["model_sel"].mean()),
        truth=truth,
        mean_delta=float(each["delta"].mean()),
        covered=covered(truth),
        covered_own=covered(each["own_truth"]),
        false_positives_equal=rejected("p_equal"),
        false_positives_random=rejected("p_random"),
        by_row_equal=rejected("by_row_equal"),
        by_row_random=rejected("by_row_random"),
        random_sel=max(
            (float(each[name].mean()) for name in ("random_model_sel", "random_sae_sel")),
            key=lambda sel: abs(sel - 0.5),
        ),
        covered_model=float(np.mean((each["model_low"] <= model_truth) & (model_truth <= each["model_high"]))),
        judges_null_sel=setting.judges_null_sel,
    )


def mcnemar(found: OutOfFold) -> float:
    """Return p of McNemar's exact test in the first partition, on the rows that only one view gets right."""
    scores = found.probe(0)
    model, sae = (correct(scores, view)[0] > 0 for view in ("model", "sae"))
    only_model, only_sae = int((model & ~sae).sum()), int((sae & ~model).sum())
    n, fewer = only_model + only_sae, min(only_model, only_sae)
    return min(1.0, 2 * float(bdtr(fewer, n, 0.5)))


def _true_model_sel(world: GaussianWorld, model: ModelFit, noise: float) -> float:
    """Return the true balanced accuracy of the model's probes for the trait, mean over the splits."""
    coef, intercept = model.fit.coef[0].numpy(), model.fit.intercept[0].numpy()
    return float(world.balanced_accuracy(coef, intercept, noise).mean())


def _true_sel(world: GaussianWorld, backend: KeepsFits, found: OutOfFold, noise: float) -> float:
    """Return the same for the SAE view's probes that `backend` has just fitted, at the C chosen for each fold."""
    fits = backend.last
    assert fits is not None
    chosen = np.searchsorted(DEFAULT_CS, found.fits["sae"].chosen_c[0].ravel())
    split = np.arange(len(chosen))
    coef, intercept = fits.coef[:, 0].numpy()[chosen, split], fits.intercept[:, 0].numpy()[chosen, split]
    return float(world.balanced_accuracy(coef, intercept, noise).mean())


def _only(results: list[ProbeResult | Skipped]) -> ProbeResult:
    (result,) = results
    assert isinstance(result, ProbeResult), "a world without enough people"
    return result


def _numbered(task: tuple[Setting, int, int]) -> Repeat:
    return measure_once(*task)


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[..., Iterator[Repeat]]]:
    """Return `map` in this process, or over several processes that use one thread each."""
    if workers == 1:
        yield map
        return
    context = get_context("spawn")  # a fork of a process with torch threads may hang
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield lambda function, tasks: pool.map(function, tasks, chunksize=5)
