"""Train SAEs on a world with SAE Lens's own classes and trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import temporary_seed
from torch import Tensor

BATCH = 512
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Recipe:
    """The settings of one training."""

    architecture: str  # SAE Lens's name
    d_sae: int
    steps: int
    options: dict[str, Any] = field(default_factory=dict)  # of the architecture: k, l1_coefficient, ...


def train(recipe: Recipe, x: Tensor, seed: int) -> Any:
    """Return a `sae_lens` TrainingSAE trained on activations x [rows, d], for several epochs if needed."""
    sae_class, config_class = get_sae_training_class(recipe.architecture)
    samples = recipe.steps * BATCH
    with temporary_seed(seed):
        sae = sae_class(config_class(d_in=x.shape[1], d_sae=recipe.d_sae, **recipe.options))
        trainer = SAETrainer(
            cfg=SAETrainerConfig(
                n_checkpoints=0,
                checkpoint_path=None,
                save_final_checkpoint=False,
                total_training_samples=samples,
                train_batch_size_samples=BATCH,
                device="cpu",
                autocast=False,
                lr=LEARNING_RATE,
                lr_end=LEARNING_RATE / 10,
                lr_scheduler_name="constant",
                lr_warm_up_steps=min(50, recipe.steps // 4),
                lr_decay_steps=recipe.steps // 5,
                n_restart_cycles=1,
                adam_beta1=0.9,
                adam_beta2=0.999,
                dead_feature_window=200,
                feature_sampling_window=2000,
                n_batches_for_norm_estimate=1,  # of a normalisation that no recipe uses
                logger=LoggingConfig(log_to_wandb=False),
            ),
            sae=sae,
            data_provider=_batches(x, seed),
        )
        trainer.fit()
    return sae.eval().requires_grad_(False)


def _batches(x: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield full batches of x endlessly, in a new order each epoch."""
    random = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=random)
        yield from (x[rows] for rows in order.split(BATCH) if len(rows) == BATCH)
