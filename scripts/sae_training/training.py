"""Train many SAEs side by side on the same shuffled batches of a harvest; resumes an interrupted training.

trained = train(acts, settings, checkpoints_folder)     # [Trained], weights for raw activations
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.system.bars import open_bar
from scripts.sae_training.harvest import TRAIN, Activations, Scale
from scripts.sae_training.kinds import KINDS, StepSettings, TopKSae, Weights, k_th_largest, train_step

log = logging.getLogger(__name__)

BUFFER_SHARDS = 8  # shards that are in memory at a time and shuffled together
CALIBRATION_ROWS = 16_384  # activations that set the single threshold of an SAE that keeps k x batch


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training. Its checkpoints cannot be used with other settings."""

    saes: tuple[tuple[str, int], ...]  # (kind, k): one of each at every layer
    layers: tuple[int, ...]
    d_sae: int = 4096
    tokens: int = 4_000_000  # per SAE; if the harvest has fewer, they are repeated
    seed: int = 0
    step: StepSettings = field(default_factory=lambda: StepSettings(batch=1024))

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.step.batch)


@dataclass(frozen=True)
class Trained:
    """An SAE for raw activations."""

    kind: str
    k: int
    layer: int
    weights: Weights


def train(
    acts: Activations,
    settings: TrainSettings,
    folder: Path,
    threads: int = 1,
    minutes_between_checkpoints: float = 10.0,
    quiet: bool = False,
) -> list[Trained]:
    """Train every SAE at every layer. The result is bitwise identical whether or not the training was interrupted.

    folder: for checkpoints. Raises `RequestError` if it has checkpoints of other settings.
    """
    missing = sorted(set(settings.layers) - set(acts.layers))
    if missing:
        raise RequestError(f"`layers` {missing[0]}: {acts.folder} has activations of layers {acts.layers}")
    batches = Batches(acts, settings)
    saes = _new_saes(acts, settings, batches.first())
    optimisers = [torch.optim.Adam(sae.parameters(), lr=settings.step.lr, fused=True) for sae in saes]
    checkpoint = Checkpoint(folder, settings, acts)
    done, saved_at = checkpoint.load(saes, optimisers), time.monotonic()
    with ThreadPoolExecutor(threads) as pool, open_bar(settings.steps, "train", "step", quiet=quiet) as bar:
        bar.update(done)
        for step, batch in enumerate(batches.after(done), done + 1):
            rate = settings.step.lr * settings.step.rate((step - 1) / settings.steps, 1 / settings.steps)
            for optimiser in optimisers:
                optimiser.param_groups[0]["lr"] = rate
            inputs = [batch[sae.layer] for sae in saes]
            losses = list(pool.map(lambda s, o, x: train_step(s, o, x, settings.step), saes, optimisers, inputs))
            bar.set_postfix_str(f"loss {min(losses):.3f} to {max(losses):.3f}", refresh=False)
            bar.update(1)
            if time.monotonic() - saved_at > 60 * minutes_between_checkpoints or step == settings.steps:
                checkpoint.save(step, saes, optimisers)
                saved_at = time.monotonic()
    return [Trained(sae.kind, sae.k, sae.layer, raw_weights(sae, acts.scales[sae.layer], acts)) for sae in saes]


def _new_saes(acts: Activations, settings: TrainSettings, first: dict[int, Tensor]) -> list[TopKSae]:
    """Return SAEs with the same random initialisation at all layers and for all kinds."""
    saes = []
    for layer in settings.layers:
        for kind, k in settings.saes:
            generator = torch.Generator().manual_seed(settings.seed)
            sae = KINDS[kind](layer, k, torch.zeros_like(acts.scales[layer].mean), settings.d_sae, generator)
            sae.start(first[layer])
            saes.append(sae)
    return saes


@dataclass(frozen=True)
class Batches:
    """Shuffled batches: layer -> float32 [batch, d_in], centred and scaled; with the same tokens at every layer."""

    acts: Activations
    settings: TrainSettings

    def first(self) -> dict[int, Tensor]:
        """Return the first batch."""
        return next(self.after(0))

    def after(self, done: int) -> Iterator[dict[int, Tensor]]:
        """Yield the batches from step `done` to the end of the training, without reading earlier ones."""
        size, left = self.settings.step.batch, self.settings.steps - done
        for group, order in self._groups():
            n = sum(map(self.acts.rows_of, group)) // size
            if done >= n:
                done -= n
                continue
            buffer = {layer: self._read(group, layer) for layer in self.settings.layers}
            permutation = torch.randperm(len(next(iter(buffer.values()))), generator=order)
            for rows in permutation[: n * size].split(size)[done:][:left]:
                yield {layer: self._scaled(x[rows], self.acts.scales[layer]) for layer, x in buffer.items()}
            left -= n - done
            done = 0
            if left <= 0:
                return

    def _groups(self) -> Iterator[tuple[list[int], torch.Generator]]:
        """Yield the shards that are shuffled together, and the seed, epoch after epoch."""
        order = torch.Generator().manual_seed(self.settings.seed)
        while True:
            for shards in torch.randperm(self.acts.shards(TRAIN), generator=order).split(BUFFER_SHARDS):
                seed = int(torch.randint(2**62, (), generator=order))
                yield shards.tolist(), torch.Generator().manual_seed(seed)

    def _read(self, shards: Sequence[int], layer: int) -> Tensor:
        return torch.cat([self.acts.read(TRAIN, shard, layer) for shard in shards])

    @staticmethod
    def _scaled(x: Tensor, scale: Scale) -> Tensor:
        return (x.float() - scale.mean) / scale.deviation


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training on disk."""

    folder: Path
    settings: TrainSettings
    acts: Activations

    def load(self, saes: Sequence[TopKSae], optimisers: Sequence[torch.optim.Optimizer]) -> int:
        """Return the number of finished steps, and set the SAEs and optimisers to their state."""
        if not self._path.exists():
            return 0
        state = torch.load(self._path, weights_only=True)
        if state["about"] != self._about():
            raise RequestError(
                f"`output_directory` {self.folder}: it has checkpoints of a training with other settings"
            )
        for sae, of_sae in zip(saes, state["saes"], strict=True):
            sae.load_state_dict(of_sae)
        for optimiser, of_optimiser in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(of_optimiser)
        return int(state["step"])

    def save(self, step: int, saes: Sequence[TopKSae], optimisers: Sequence[torch.optim.Optimizer]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "about": self._about(),
            "step": step,
            "saes": [sae.state_dict() for sae in saes],
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        }
        unfinished = self._path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _about(self) -> str:
        return json.dumps([asdict(self.settings), self.acts.facts], sort_keys=True)


@torch.no_grad()
def raw_weights(sae: TopKSae, scale: Scale, acts: Activations) -> Weights:
    """Return a trained SAE's weights for raw activations; matrices are rounded to bfloat16, as they are saved."""
    weights = sae.unscaled(scale.deviation)
    weights["b_dec"] += scale.mean
    weights = {name: tensor.to(torch.bfloat16).float() for name, tensor in weights.items()}
    if sae.kind == "topk":
        return weights
    return weights | at_l0(weights, sae.kind, sae.k, acts.read(TRAIN, 0, sae.layer)[:CALIBRATION_ROWS].float())


def at_l0(weights: Weights, kind: str, k: int, x: Tensor) -> Weights:
    """Return thresholds at which k latents per row of x [rows, d_in] are active on average.

    An SAE that kept k x batch in training and is used one row at a time gets a single threshold. Learned thresholds are
    multiplied by one factor; biases of gates are reduced by one number.
    """
    product = (x - weights["b_dec"]) @ weights["W_enc"].T
    if kind == "gated":
        return {"b_gate": weights["b_gate"] - k_th_largest(product + weights["b_gate"], k)}
    pre = torch.relu(product + weights["b_enc"])
    if kind == "jumprelu":
        return {"threshold": weights["threshold"] * k_th_largest(pre / weights["threshold"], k)}
    return {"threshold": k_th_largest(pre, k).expand(len(weights["b_enc"])).clone()}
