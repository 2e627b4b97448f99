"""Activations that are sums of known features: the SynthSAEBench construction (arXiv 2602.14687) of SAE Lens.

    world = World.build(WorldSettings(seed=0))
    rows = world.sample(3000, seed=1)        # rows.x [rows, d], rows.activations [rows, features]

There are more features than dimensions, in random directions (superposition). Firing rates follow Zipf's law and are
correlated through a Gaussian copula. Part of the features form trees, in which a child is active only if its parent is,
and some siblings exclude each other. An activation is the sum of the active features plus a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sae_lens.synthetic import (
    HierarchyConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from sae_lens.util import temporary_seed
from torch import Tensor


@dataclass(frozen=True)
class WorldSettings:
    """Settings from which a world is drawn."""

    seed: int = 0
    n_features: int = 192
    d: int = 64
    trees: int = 24  # of a parent and four children each
    rarest: float = 0.02  # requested firing rates; children of rare parents fire less
    commonest: float = 0.3


@dataclass(frozen=True)
class Rows:
    """Samples of a world."""

    x: Tensor  # float32 [rows, d]
    activations: Tensor  # float32 [rows, features]; 0 where a feature is inactive

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class World:
    """x = activations @ directions + bias."""

    settings: WorldSettings
    model: SyntheticModel
    children: dict[int, tuple[int, ...]]  # parent -> its children

    @classmethod
    def build(cls, settings: WorldSettings) -> World:
        """Build the world; deterministic by the seed of the settings."""
        config = SyntheticModelConfig(
            num_features=settings.n_features,
            hidden_dim=settings.d,
            firing_probability=ZipfianFiringProbabilityConfig(0.5, settings.commonest, settings.rarest),
            hierarchy=HierarchyConfig(
                total_root_nodes=settings.trees,
                branching_factor=4,
                max_depth=1,
                mutually_exclusive_portion=0.5,
                compensate_probabilities=True,
            ),
            correlation=LowRankCorrelationConfig(rank=8, correlation_scale=0.1),
            mean_firing_magnitudes=1.0,
            std_firing_magnitudes=0.3,
            seed=settings.seed,
        )
        model = SyntheticModel(config)
        roots = model.hierarchy.roots if model.hierarchy else []
        children = {
            root.feature_index: tuple(child.feature_index for child in root.children)
            for root in roots
            if root.feature_index is not None
        }
        return cls(settings, model.requires_grad_(False), children)

    @property
    def directions(self) -> Tensor:
        """Return [features, d], rows of length 1."""
        return self.model.feature_dict.feature_vectors

    @property
    def bias(self) -> Tensor:
        """Return the constant, [d]."""
        return self.model.feature_dict.bias

    def sample(self, n: int, seed: int) -> Rows:
        """Draw independent rows. SAE Lens uses torch's global generator, whose state is restored."""
        with temporary_seed(seed):
            activations = self.model.activation_generator.sample(n)
        return Rows(activations @ self.directions + self.bias, activations)


def tasks(rows: Rows, count: int) -> Tensor:
    """Return `count` features to probe, evenly spaced in the order of their frequency in `rows`: int64 [count].

    This represents rare and common features alike.
    """
    order = torch.argsort((rows.activations > 0).sum(dim=0), descending=True, stable=True)
    places = (torch.arange(count) + 0.5) * len(order) / count
    return order[places.long()]
