"""All measurements of `scripts/validate.py`: which plants are measured on which data, in quick and in full mode.

rows = validate(QUICK, workers=2)
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from delta_selectivity.probing.probes import ProbeBackend, choose_backend
from validation import bundled, coverage, plants
from validation.table import Row
from validation.world import GaussianWorld, SparseWorld

log = logging.getLogger(__name__)

SYNTHETIC = GaussianWorld(people=3000, mentions=(1, 1), d=64, signal=(1.5, 1.2, 1.5), decay=0.5)
SYNTHETIC_RANKS = (1, 4, 8, 16, 32, 48, 64)
SPARSE = SparseWorld(people=1500, d=32, features=96, active=4, signal=0.4, noise=0.3, n_tasks=2)
SPARSE_TILTS = {"SAE that knows the features": 0.0, "the same, 5 degrees off": 5.0, "10 degrees off": 10.0}
BUNDLED_RANKS = (1, 4, 16, 64, 256)
MOST_LEFT = (
    0.5  # share of sae_sel - 1/2 that may remain after permuting decoder rows, if traits are in quiet directions
)
SEED_ROWS = 3000
SEED_NOISE = 0.5  # standard deviations of each feature


@dataclass(frozen=True)
class Scale:
    """The size of the measurements."""

    name: str
    settings: tuple[coverage.Setting, ...]
    repeats: int  # per setting
    bundled_rows: int  # per task
    bundled_apart: int | None  # rows per task for fitting erasers; None: the bundled model's concepts are not erased
    latent_views: int | None  # tasks and SAEs of the bundled model whose codes are probed; None: all
    max_length: int | None  # last tokens of each text that the bundled model reads; None: all
    plants: bool = True  # only the settings, no plants


QUICK = Scale("quick", (coverage.SETTINGS[0], coverage.SETTINGS[-1]), 40, 800, None, 1, 32)
FULL = Scale("full", (*coverage.SETTINGS, *coverage.FEW_OR_UNEQUAL), 500, 1200, 2400, None, None)
PEOPLE = Scale("people", coverage.FEW_OR_UNEQUAL, 200, 0, None, None, None, plants=False)


def validate(scale: Scale, workers: int, seed: int = 0) -> list[Row]:
    """Return all rows of the report: plants by ground, then rates by setting; deterministic for any `workers`."""
    rows: list[Row] = []
    for name, part in _parts(scale, workers, seed):
        start = time.perf_counter()
        rows += part()
        log.info("%s: %.0f s", name, time.perf_counter() - start)
    return rows


def _parts(scale: Scale, workers: int, seed: int) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    backend, _ = choose_backend("torch", "cpu")
    if scale.plants:
        yield "synthetic world", functools.partial(on_synthetic, backend, seed)
        yield "sparse world", functools.partial(on_sparse, backend, seed)
        yield "bundled model", functools.partial(on_bundled, scale, backend, seed)
    rates = coverage.measure_settings(scale.settings, scale.repeats, seed, workers)
    for setting in scale.settings:
        yield setting.name, lambda: next(rates).rows()


def on_synthetic(backend: ProbeBackend, seed: int) -> list[Row]:
    """Measure three independent traits across all axes of a Gaussian world."""
    random = np.random.default_rng(seed)
    rows, apart = SYNTHETIC.sample(random), SYNTHETIC.sample(random)
    ground = plants.Ground("synthetic", [plants.Bench(rows, backend, seed)], dict.fromkeys(rows.tasks, apart), {})
    ablations = {task: functools.partial(SYNTHETIC.without, t) for t, task in enumerate(rows.tasks)}
    damage = functools.partial(plants.noisy, level=SEED_NOISE, seed=seed)
    return [
        *plants.identity(ground),
        *plants.erased(ground, "LEACE", plants.leace(ground)),
        *plants.erased(ground, "true direction", ablations),
        *plants.rotation(ground, seed),
        *plants.noise_ladder(ground, seed),
        *plants.principal_component_ladder(ground, SYNTHETIC_RANKS),
        *plants.seeds("synthetic", [rows], damage, f"noise of {SEED_NOISE} SD", backend),
    ]


def on_sparse(backend: ProbeBackend, seed: int) -> list[Row]:
    """Measure SAEs whose features are known, and random and permuted ones."""
    rows = SPARSE.sample(np.random.default_rng(seed))
    ground = plants.Ground("sparse", [plants.Bench(rows, backend, seed)], {}, SPARSE.saes(SPARSE_TILTS))
    return [*plants.random_saes(ground, seed), *plants.shuffled_decoder(ground, MOST_LEFT, seed)]


def on_bundled(scale: Scale, backend: ProbeBackend, seed: int) -> list[Row]:
    """Measure the bundled model's activations and its two SAEs."""
    ground = bundled.bundled_ground(scale.bundled_rows, scale.bundled_apart or 0, backend, seed, scale.max_length)
    few = slice(scale.latent_views)
    with_latents = plants.Ground(ground.name, ground.benches[few], {}, dict(list(ground.saes.items())[few]))
    rows = plants.identity(ground)
    if scale.bundled_apart is not None:
        planted = bundled.with_planted_trait(ground, backend, seed)
        rows += plants.erased(planted, "LEACE", plants.leace(planted))
        rows += plants.erased(ground, "LEACE", plants.leace(ground), independent=False)
    rows += [
        *plants.rotation(ground, seed),
        *plants.noise_ladder(ground, seed),
        *plants.principal_component_ladder(ground, BUNDLED_RANKS),
        *plants.random_saes(ground, seed),
        *plants.shuffled_decoder(with_latents, None, seed),
    ]
    if scale.bundled_apart is None:
        return rows
    name, sae = list(ground.saes.items())[-1]
    together = [
        bundled.joined(task, [bench.rows, ground.apart[task]], SEED_ROWS)
        for bench in ground.benches
        for task in bench.rows.tasks
    ]
    return [*rows, *plants.seeds(ground.name, together, functools.partial(plants.through, sae), f"SAE {name}", backend)]
