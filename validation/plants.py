"""Plants: reconstructions whose effect on a right metric is known before it is measured (METRIC.md, section 3).

    ground = Ground("synthetic", [Bench(rows, backend)], apart={...}, saes={...})
    rows = identity(ground) + rotation(ground) + noise_ladder(ground)

Each plant is a function from a ground to rows of the table; what it must give is in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from concept_erasure import LeaceEraser
from scipy.stats import spearmanr
from torch import Tensor

from calibration import principal_axes
from probe_statistics import correct
from probes import ProbeBackend
from sae_loader import IdentityCoder, Sae, ShuffledDecoder, SparseRows, principal_components, random_topk
from selectivity import FoldPlan, OutOfFold, ProbeResult, fit_model, measure, out_of_fold
from uncertainty import estimate_delta
from validation.table import Row, judged, told
from validation.world import Rows

Reconstruct = Callable[[Tensor], Tensor]  # [rows, d] -> [rows, d]

N_FOLDS, N_REPEATS = 5, 5
NOISE_LEVELS = tuple(0.3 * step for step in range(1, 11))  # standard deviations of each feature
SEEDS = 5
SEED_ROWS = 3000


class Bench:
    """Rows with their folds and the model's own probes, which all plants share."""

    def __init__(self, rows: Rows, backend: ProbeBackend, seed: int = 0) -> None:
        self.rows, self.backend = rows, backend
        self.plan = FoldPlan.build(rows.labels, rows.persons, None, N_FOLDS, N_REPEATS, seed)
        self.model = fit_model(self.plan, rows.x, backend)

    def found(self, recon: Tensor, latents: Tensor | None = None) -> OutOfFold:
        """Out-of-fold scores of a reconstruction `[rows, d]`, and of codes (sparse CSR)."""
        return out_of_fold(self.plan, self.model, recon, self.backend, latents=latents)

    def results(self, recon: Tensor, latents: Tensor | None = None) -> dict[str, ProbeResult]:
        """What the metric says of them, by task."""
        results = dict(zip(self.rows.tasks, measure(self.found(recon, latents)), strict=True))
        return {task: result for task, result in results.items() if isinstance(result, ProbeResult)}


@dataclass(frozen=True)
class Ground:
    """Where plants are set: benches, each with tasks on rows of its own."""

    name: str
    benches: Sequence[Bench]
    apart: Mapping[str, Rows]  # by task: people who are on no bench, for what must not be fitted on the evaluated
    saes: Mapping[str, Sae]  # trained on this world, or made of its truth

    def results(self, reconstruct: Reconstruct) -> dict[str, ProbeResult]:
        """What the metric says of a reconstruction, by task, over all benches."""
        found = [bench.results(reconstruct(bench.rows.x)) for bench in self.benches]
        return {task: result for results in found for task, result in results.items()}


def identity(ground: Ground) -> list[Row]:
    """x̂ = x: delta and transfer are exactly 0."""

    def same(x: Tensor) -> Tensor:
        coder = IdentityCoder(x.shape[1], x.device)
        return coder.decode(coder.encode(x))

    results = ground.results(same).values()
    delta = max(abs(result.delta_sel) for result in results)
    transfer = max(abs(result.transfer_delta or 0) for result in results)
    return [
        judged(ground.name, "identity", "largest abs(delta_sel)", delta, 0, 0),
        judged(ground.name, "identity", "largest abs(transfer_delta)", transfer, 0, 0),
    ]


def leace(ground: Ground) -> dict[str, Reconstruct]:
    """By task, the least-squares eraser of its label, fitted on people who are on no bench.

    Belrose et al. 2023, arXiv 2306.03819. Fitted on the evaluated rows it would take the sampling error along, and
    leave probes below chance.
    """
    erasers = {}
    for task, rows in ground.apart.items():
        label = torch.from_numpy(rows.labels[rows.tasks.index(task)]).double()
        erasers[task] = _in_float64(LeaceEraser.fit(rows.x.double(), label))
    return erasers


def erased(ground: Ground, method: str, erasers: Mapping[str, Reconstruct]) -> list[Row]:
    """One concept erased: its sae_sel is at most 0.60, every other delta within 0.005."""
    left, moved = [], []
    for target, erase in erasers.items():
        results = ground.results(erase)
        left.append(results[target].sae_sel)
        moved += [abs(result.delta_sel) for task, result in results.items() if task != target]
    plant = f"concept erased, {method}"
    rows = [judged(ground.name, plant, "highest sae_sel of a target", max(left), high=0.60)]
    if moved:
        rows.append(judged(ground.name, plant, "largest abs(delta_sel) of another task", max(moved), high=0.005, digits=4))
    return rows


def rotation(ground: Ground, seed: int = 0) -> list[Row]:
    """A random rotation of the standardised features loses nothing, and no probe of the model's survives it.

    Standardised, because the penalty sees features by their scale: then it cannot tell x̂ from x. abs(delta_sel) is at
    most 0.005 and transfer_delta at most -0.2, for every task.
    """

    def rotate(x: Tensor) -> Tensor:
        turn = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], dtype=torch.float64, generator=_generator(seed)))[0]
        mean, scale = x.double().mean(dim=0), x.double().std(dim=0)
        return (((x - mean) / scale) @ turn * scale + mean).float()

    results = ground.results(rotate).values()
    delta = max(abs(result.delta_sel) for result in results)
    transfer = max(result.transfer_delta or 0 for result in results)
    return [
        judged(ground.name, "lossless rotation", "largest abs(delta_sel)", delta, high=0.005, digits=4),
        judged(ground.name, "lossless rotation", "highest transfer_delta", transfer, high=-0.2),
    ]


def noise_ladder(ground: Ground, seed: int = 0) -> list[Row]:
    """Ten times more and more of one draw of noise: Spearman's correlation with delta at most -0.98 for each task."""
    ladder = [ground.results(lambda x, level=level: _noisy(x, level, seed)) for level in NOISE_LEVELS]  # type: ignore[misc]
    return [
        judged(
            ground.name,
            "noise ladder",
            f"Spearman(noise, delta_sel), {task}",
            float(spearmanr(NOISE_LEVELS, [step[task].delta_sel for step in ladder]).statistic),
            high=-0.98,
        )
        for task in ladder[0]
    ]


def principal_component_ladder(ground: Ground, ranks: Sequence[int]) -> list[Row]:
    """PCA of rising rank: delta rises to 0.

    A step back counts if the paired difference of the two ranks is below 0 beyond its 95 % interval, shared among all
    steps of all tasks (Bonferroni). At the last rank, all of d, only rounding is left: abs(delta_sel) at most 0.002.
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
            steps = [estimate_delta(b - a, labels, persons) for a, b in zip(right, right[1:], strict=False)]
            back += sum(step.interval(1 - 0.05 / n_steps)[1] < 0 for step in steps)
            climbs.append(float(spearmanr(ranks, delta).statistic))
            last = max(last, abs(delta[-1]))
    plant = f"PCA of rank {', '.join(map(str, ranks))}"
    return [
        judged(ground.name, plant, f"steps back beyond their error, of {n_steps}", back, high=0, digits=0),
        judged(ground.name, plant, "lowest Spearman(rank, delta_sel) of a task", min(climbs), low=0.9),
        judged(ground.name, plant, "abs(delta_sel) at full rank", last, high=0.002, digits=4),
    ]


def random_saes(ground: Ground, seed: int = 0) -> list[Row]:
    """A TopK SAE of random directions, as wide and as sparse as each trained one, keeps less than any of them."""
    trained, random = {}, {}
    for name, sae in ground.saes.items():
        k = round(float(torch.cat([sae.encode(bench.rows.x).l0() for bench in ground.benches]).mean()))
        trained[name] = _mean_delta(ground, lambda x, sae=sae: sae.decode(sae.encode(x)))  # type: ignore[misc]
        mean = torch.cat([bench.rows.x for bench in ground.benches]).mean(dim=0)
        coder = random_topk(mean, sae.d_sae, k, _generator(seed))
        random[name] = _mean_delta(ground, lambda x, coder=coder: coder.decode(coder.encode(x)))  # type: ignore[misc]
    plant = "random TopK SAE"
    rows = [
        told(ground.name, plant, f"mean delta_sel of {name}, and of random directions {random[name]:+.3f}", trained[name])
        for name in trained
    ]
    margin = min(trained.values()) - max(random.values())
    return [*rows, judged(ground.name, plant, "worst trained less best random, delta_sel", margin, low=1e-9)]


def shuffled_decoder(ground: Ground, seed: int = 0) -> list[Row]:
    """Decoder rows permuted: latent_sel does not move at all; sae_sel loses half of what it was above chance, or more."""
    kept, moved = [], []
    for sae in ground.saes.values():
        coder = ShuffledDecoder(sae.coder, torch.randperm(sae.d_sae, generator=_generator(seed)))
        shuffled = replace(sae, coder=coder)
        for bench in ground.benches:
            x = bench.rows.x
            intact, permuted = (
                bench.results(one.decode(codes := one.encode(x)), csr(codes)) for one in (sae, shuffled)
            )
            for task in bench.rows.tasks:
                kept.append((permuted[task].sae_sel - 0.5) / (intact[task].sae_sel - 0.5))
                moved.append(abs((permuted[task].latent_sel or 0) - (intact[task].latent_sel or 1)))
    plant = "decoder rows permuted"
    return [
        judged(ground.name, plant, "largest share of sae_sel - 1/2 that is left", max(kept), high=0.5),
        judged(ground.name, plant, "largest change of latent_sel", max(moved), 0, 0),
    ]


def seeds(ground: Ground, damage: Reconstruct, what: str) -> list[Row]:
    """The same rows folded anew by five seeds: the standard deviation of delta is at most 0.003 for every task."""
    deltas: dict[str, list[float]] = {}
    for bench in ground.benches:
        recon = damage(bench.rows.x)
        for seed in range(SEEDS):
            for task, result in Bench(bench.rows, bench.backend, seed).results(recon).items():
                deltas.setdefault(task, []).append(result.delta_sel)
    spread = max(float(np.std(values, ddof=1)) for values in deltas.values())
    n = min(len(bench.rows.persons) for bench in ground.benches)
    plant = f"{SEEDS} seeds, {n} rows, {what}"
    return [
        judged(ground.name, plant, "largest SD of delta_sel", spread, high=0.003, digits=4),
        told(ground.name, plant, "smallest reliable difference, 2.77 SD", 2.77 * spread, digits=4),
    ]


def _mean_delta(ground: Ground, reconstruct: Reconstruct) -> float:
    return float(np.mean([result.delta_sel for result in ground.results(reconstruct).values()]))


def _noisy(x: Tensor, level: float, seed: int) -> Tensor:
    return x + level * x.std(dim=0) * torch.randn(x.shape, generator=_generator(seed))


def _in_float64(eraser: LeaceEraser) -> Reconstruct:
    return lambda x: eraser(x.double()).float()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def csr(codes: SparseRows) -> Tensor:
    """Codes as the sparse matrix `[rows, d_sae]` that probes take."""
    return torch.sparse_csr_tensor(codes.crow, codes.col, codes.value, (codes.n_rows, codes.n_cols))
