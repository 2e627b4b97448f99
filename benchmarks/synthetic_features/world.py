"""Activations that are sums of known features: the SynthSAEBench construction (arXiv 2602.14687) of SAE Lens.

    world = World.build(WorldSettings(seed=0))
    rows = world.sample(3000, seed=1)        # rows.x [rows, d], rows.activations [rows, features]

More features than dimensions, in random directions (superposition); firing rates by Zipf's law; firing correlated
through a Gaussian copula; part of the features in trees, where a child fires only if its parent does and some
siblings exclude each other. An activation is the sum of the features that fire, plus a constant.
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
    """What a world is drawn from."""

    seed: int = 0
    n_features: int = 192
    d: int = 64
    trees: int = 24  # of a parent and four children each
    rarest: float = 0.02  # firing rates that are asked for; children of rare parents fire less
    commonest: float = 0.3


@dataclass(frozen=True)
class Rows:
    """Draws from a world."""

    x: Tensor  # float32 [rows, d]
    activations: Tensor  # float32 [rows, features]; 0 where a feature is absent

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
        """Deterministic by the seed of the settings."""
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
        """[features, d], of length 1."""
        return self.model.feature_dict.feature_vectors

    @property
    def bias(self) -> Tensor:
        """[d]"""
        return self.model.feature_dict.bias

    def sample(self, n: int, seed: int) -> Rows:
        """Independent rows. SAE Lens draws from torch's own generator, which is left as it was."""
        with temporary_seed(seed):
            activations = self.model.activation_generator.sample(n)
        return Rows(activations @ self.directions + self.bias, activations)


def tasks(rows: Rows, count: int) -> Tensor:
    """Features to probe for: `count` of them evenly through the order of their frequency in `rows`. int64 [count]

    So they stand for all features alike, the rare with the common.
    """
    order = torch.argsort((rows.activations > 0).sum(dim=0), descending=True, stable=True)
    places = (torch.arange(count) + 0.5) * len(order) / count
    return order[places.long()]
