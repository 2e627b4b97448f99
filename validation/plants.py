"""Plants: reconstructions whose effect on a correct metric is known in advance.

    ground = Ground("synthetic", [Bench(rows, backend)], apart={...}, saes={...})
    rows = identity(ground) + rotation(ground) + noise_ladder(ground)

Each plant is a function from a ground to rows of the table; its docstring states the required result.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from concept_erasure import LeaceEraser  # type: ignore[import-untyped]
from scipy.stats import spearmanr
from torch import Tensor

from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.probe_statistics import correct
from delta_selectivity.probing.probes import ProbeBackend
from delta_selectivity.probing.selectivity import OutOfFold, ProbeResult, fit_model, measure, out_of_fold
from delta_selectivity.probing.uncertainty import estimate_delta
from delta_selectivity.run.calibration import principal_axes
from delta_selectivity.saes import Coder, IdentityCoder, Sae, ShuffledDecoder, principal_components, random_topk
from validation.table import Row, judged, reported
from validation.world import Rows

Reconstruct = Callable[[Tensor], Tensor]  # [rows, d] -> [rows, d]

N_FOLDS, N_REPEATS = 5, 5
NOISE_LEVELS = tuple(0.3 * step for step in range(1, 11))  # standard deviations of each feature
RANDOM_SAES = 3  # draws per trained SAE
SEEDS = 5


class Bench:
    """Rows with their folds and the model's own probes, which all plants share."""

    def __init__(self, rows: Rows, backend: ProbeBackend, seed: int = 0) -> None:
        self.rows, self.backend = rows, backend
        self.plan = FoldPlan.build(rows.labels, rows.persons, None, N_FOLDS, N_REPEATS, seed)
        self.model = fit_model(self.plan, rows.x, backend)

    def found(self, recon: Tensor, latents: Tensor | None = None) -> OutOfFold:
        """Return out-of-fold scores of a reconstruction `[rows, d]`, and of codes (sparse CSR)."""
        return out_of_fold(self.plan, self.model, recon, self.backend, latents=latents)

    def results(self, recon: Tensor, latents: Tensor | None = None) -> list[tuple[str, ProbeResult]]:
        """Return the statistics of these scores, by task."""
        measured = measure(self.found(recon, latents))
        assert all(isinstance(result, ProbeResult) for result in measured), "a world without enough people"
        return list(zip(self.rows.tasks, measured, strict=True))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Ground:
    """The data on which plants are measured: benches, each with tasks on rows of its own."""

    name: str
    benches: Sequence[Bench]
    apart: Mapping[str, Rows]  # by task: people who are on no bench, for fits that must not use the evaluated rows
    saes: Mapping[str, Sae]  # trained on this world, or constructed from its true features

    def results(self, reconstruct: Reconstruct) -> list[tuple[str, ProbeResult]]:
        """Return the statistics of a reconstruction, by task, over all benches; a task may be on several."""
        return [found for bench in self.benches for found in bench.results(reconstruct(bench.rows.x))]


def identity(ground: Ground) -> list[Row]:
    """x̂ = x: delta and transfer must be exactly 0."""

    def same(x: Tensor) -> Tensor:
        coder = IdentityCoder(x.shape[1], x.device)
        return coder.decode(coder.encode(x))

    results = ground.results(same)
    delta = max(abs(result.delta_sel) for _, result in results)
    transfer = max(abs(_number(result.transfer_delta)) for _, result in results)
    return [
        judged(ground.name, "identity", "largest abs(delta_sel)", delta, 0, 0),
        judged(ground.name, "identity", "largest abs(transfer_delta)", transfer, 0, 0),
    ]


def leace(ground: Ground) -> dict[str, Reconstruct]:
    """Return, by task, the least-squares eraser of its label, fitted on people who are on no bench.

    Belrose et al. 2023, arXiv 2306.03819. Fitted on the evaluated rows, it would also remove the sampling error and
    leave probes below chance.
    """
    erasers: dict[str, Reconstruct] = {}
    for task, rows in ground.apart.items():
        label = torch.from_numpy(rows.labels[rows.tasks.index(task)]).double()
        eraser = LeaceEraser.fit(rows.x.double(), label)
        erasers[task] = functools.partial(_erase, eraser)
    return erasers


def erased(ground: Ground, method: str, erasers: Mapping[str, Reconstruct], independent: bool = True) -> list[Row]:
    """Erase one concept: its sae_sel must be at most 0.60, and the delta of independent concepts within 0.005."""
    left, moved = [], []
    for target, erase in erasers.items():
        results = ground.results(erase)
        left += [result.sae_sel for task, result in results if task == target]
        moved += [abs(result.delta_sel) for task, result in results if task != target]
    plant = f"concept erased, {method}"
    rows = [judged(ground.name, plant, "highest sae_sel of a target", max(left), high=0.60)]
    other, figure = max(moved), "largest abs(delta_sel) of another task"
    return [
        *rows,
        judged(ground.name, plant, figure, other, high=0.005, digits=4)
        if independent
        else reported(ground.name, plant, figure, other, digits=4),
    ]


def rotation(ground: Ground, seed: int = 0) -> list[Row]:
    """Rotate the standardised features randomly: nothing is lost, but the model's own probes fail.

    Features are standardised, because the penalty depends on their scale. abs(delta_sel) must be at most 0.005 and
    transfer_delta at most -0.2, for every task.
    """

    def rotate(x: Tensor) -> Tensor:
        turn = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], dtype=torch.float64, generator=_generator(seed)))[0]
        mean, scale = x.double().mean(dim=0), x.double().std(dim=0)
        return (((x - mean) / scale) @ turn * scale + mean).float()

    results = ground.results(rotate)
    delta = max(abs(result.delta_sel) for _, result in results)
    transfer = max(_number(result.transfer_delta) for _, result in results)
    return [
        judged(ground.name, "lossless rotation", "largest abs(delta_sel)", delta, high=0.005, digits=4),
        judged(ground.name, "lossless rotation", "highest transfer_delta", transfer, high=-0.2),
    ]


def noise_ladder(ground: Ground, seed: int = 0) -> list[Row]:
    """Add growing multiples of one draw of noise: Spearman's correlation with delta must be at most -0.98."""
    ladder = [ground.results(functools.partial(noisy, level=level, seed=seed)) for level in NOISE_LEVELS]
    return [
        judged(
            ground.name,
            "noise ladder",
            f"Spearman(noise, delta_sel), {task}",
            float(spearmanr(NOISE_LEVELS, [step[place][1].delta_sel for step in ladder]).statistic),
            high=-0.98,
        )
        for place, (task, _) in enumerate(ladder[0])
    ]


def principal_component_ladder(ground: Ground, ranks: Sequence[int]) -> list[Row]:
    """Use PCA of rising rank: delta must rise to 0.

    A decrease counts if the paired difference of the two ranks is below 0 beyond its 95 % interval, corrected for all
    steps of all tasks (Bonferroni). At the last rank, d, only rounding is left: abs(delta_sel) must be at most 0.002.
    """
    back, last, climbs = 0, 0.0, []
    n_steps = (len(ranks) - 1) * sum(len(bench.rows.tasks) for bench in ground.benches)
    for bench in ground.benches:
        mean, axes = principal_axes(bench.rows.x)
        ladder = []
        for rank in ranks:
            coder = principal_components(axes[:rank], mean)
            ladder.append(bench.found(coder.decode(coder.encode(bench.rows.x))))
        for t in range(len(bench.rows.tasks)):
            right = [correct(found.probe(t), "sae") for found in ladder]
            model = correct(ladder[0].probe(t), "model")
            labels, persons = bench.rows.labels[t], bench.rows.persons
            delta = [estimate_delta(hits - model, labels, persons).value for hits in right]
            steps = [estimate_delta(b - a, labels, persons) for a, b in itertools.pairwise(right)]
            back += sum(step.interval(1 - 0.05 / n_steps)[1] < 0 for step in steps)
            climbs.append(float(spearmanr(ranks, delta).statistic))
            last = max(last, abs(delta[-1]))
    plant = f"PCA of rank {', '.join(map(str, ranks))}"
    return [
        judged(ground.name, plant, f"steps back beyond their error, of {n_steps}", back, high=0, digits=0),
        judged(ground.name, plant, "lowest Spearman(rank, delta_sel) of a task", round(min(climbs), 9), low=0.9),
        judged(ground.name, plant, "abs(delta_sel) at full rank", last, high=0.002, digits=4),
    ]


def random_saes(ground: Ground, seed: int = 0) -> list[Row]:
    """Use TopK SAEs of random directions, as wide and sparse as a trained one: their mean delta must be lower."""
    rows, margins = [], []
    plant = "random TopK SAE"
    for name, sae in ground.saes.items():
        k = round(float(torch.cat([sae.encode(bench.rows.x).l0() for bench in ground.benches]).mean()))
        mean = torch.cat([bench.rows.x for bench in ground.benches]).mean(dim=0)
        coders = [random_topk(mean, sae.d_sae, k, _generator(seed + draw)) for draw in range(RANDOM_SAES)]
        trained = _mean_delta(ground, functools.partial(through, sae))
        random = float(np.mean([_mean_delta(ground, functools.partial(through, coder)) for coder in coders]))
        rows += [
            reported(ground.name, plant, f"delta_sel of {name}", trained),
            reported(ground.name, plant, f"delta_sel of random, L0 {k}", random),
        ]
        margins.append(trained - random)
    return [*rows, judged(ground.name, plant, "smallest lead of a trained one, delta_sel", min(margins), low=0.001)]


def shuffled_decoder(ground: Ground, most_left: float | None, seed: int = 0) -> list[Row]:
    """Permute the decoder rows: latent_sel must not change, and sae_sel and the model's probes must be at chance.

    At most `most_left` of sae_sel - 1/2 may remain; None: it is reported but not judged, because it depends on the
    world. A permuted decoder is a random projection of the codes, which preserves much linear information. A probe
    fitted anew loses only what is drowned by large latents that did not interfere before.
    """
    left, moved, transfers = [], [], []
    for sae in ground.saes.values():
        shuffled = ShuffledDecoder(sae.coder, torch.randperm(sae.d_sae, generator=_generator(seed)))
        for bench in ground.benches:
            intact, permuted = (
                bench.results(coder.decode(codes := coder.encode(bench.rows.x)), codes.to_csr())
                for coder in (sae, shuffled)
            )
            for (_, before), (_, after) in zip(intact, permuted, strict=True):
                left.append((after.sae_sel - 0.5) / (before.sae_sel - 0.5))
                moved.append(abs(_number(after.latent_sel) - _number(before.latent_sel)))
                transfers.append(_number(after.transfer_sel))
    plant, share = "decoder rows permuted", "largest share of sae_sel - 1/2 that is left"
    return [
        judged(ground.name, plant, "largest change of latent_sel", max(moved), 0, 0),
        reported(ground.name, plant, share, max(left))
        if most_left is None
        else judged(ground.name, plant, share, max(left), high=most_left),
        judged(ground.name, plant, "highest transfer_sel", max(transfers), high=0.55),
    ]


def seeds(where: str, parts: Sequence[Rows], damage: Reconstruct, what: str, backend: ProbeBackend) -> list[Row]:
    """Repeat with five seeds of the folds: the standard deviation of delta must be at most 0.003 for every task."""
    spreads = []
    for rows in parts:
        recon = damage(rows.x)
        deltas = [[r.delta_sel for _, r in Bench(rows, backend, seed).results(recon)] for seed in range(SEEDS)]
        spreads += list(np.std(deltas, axis=0, ddof=1))
    spread = float(max(spreads))
    plant = f"{SEEDS} seeds, {min(len(rows.persons) for rows in parts)} rows, {what}"
    return [
        judged(where, plant, "largest SD of delta_sel", spread, high=0.003, digits=4),
        reported(where, plant, "smallest reliable difference, 2.77 SD", 2.77 * spread, digits=4),
    ]


def _mean_delta(ground: Ground, reconstruct: Reconstruct) -> float:
    return float(np.mean([result.delta_sel for _, result in ground.results(reconstruct)]))


def through(coder: Coder | Sae, x: Tensor) -> Tensor:
    """Return the reconstruction of x `[rows, d]`."""
    return coder.decode(coder.encode(x))


def _number(value: float | None) -> float:
    """Return a figure that must exist."""
    assert value is not None
    return value


def noisy(x: Tensor, level: float, seed: int) -> Tensor:
    """Return x `[rows, d]` with Gaussian noise of `level` standard deviations of each feature."""
    return x + level * x.std(dim=0) * torch.randn(x.shape, generator=_generator(seed))


def _erase(eraser: LeaceEraser, x: Tensor) -> Tensor:
    erased: Tensor = eraser(x.double())
    return erased.float()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
