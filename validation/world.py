"""Worlds whose truth is known: people with traits, their mentions, and activations that depend on the traits.

    sample = GaussianWorld(people=400, mentions=(5, 10), d=32, signal=(1.0,)).sample(np.random.default_rng(0))

In `GaussianWorld`, the true balanced accuracy of any linear probe has a closed form. In `SparseWorld`, the features
that an SAE should find are known. Traits belong to people; rows are mentions of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from delta_selectivity.saes import LinearCoder, Sae, Threshold

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Activations of mentions, and the traits of the people mentioned."""

    x: Tensor  # float32 [rows, d]
    labels: NDArray[np.bool_]  # [tasks, rows]
    persons: NDArray[np.int64]  # [rows]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class GaussianWorld:
    """Activations that are Gaussian given the traits: x = mixing (sum_t +-signal_t w_t + noise), w_t orthonormal.

    Axis h of the noise has variance h^-decay before a rotation, and every w_t lies across all axes. `person_share` of
    the noise's variance is the person's, the same in all of their mentions, the rest is the mention's own.
    """

    people: int
    mentions: tuple[int, int]  # minimum and maximum number of rows of a person; uniform in between
    d: int
    signal: tuple[float, ...]  # by task: half the distance of the class means in standard deviations (Mahalanobis)
    person_share: float = 0.0
    decay: float = 0.0
    seed: int = 0  # of the directions, which all samples share
    sizes: tuple[int, ...] | None = None  # rows of each person, in place of `mentions`

    @property
    def mixing(self) -> Floats:
        """Return [d, d], by which white coordinates are multiplied from the right."""
        return np.arange(1, self.d + 1)[:, None] ** (-self.decay / 2) * _orthonormal(self.d, [self.seed, 1])

    @property
    def means(self) -> Floats:
        """Return [tasks, d]: the means of people with the trait, in white coordinates; without it, the opposite."""
        return np.array(self.signal)[:, None] * _orthonormal(self.d, [self.seed, 0])[: len(self.signal)]

    def sample(self, random: np.random.Generator) -> Rows:
        """Draw new people. Half of them have each trait, independently of the others."""
        drawn = random.integers(self.mentions[0], self.mentions[1] + 1, self.people)
        persons = np.repeat(np.arange(self.people), drawn if self.sizes is None else self.sizes)
        traits = np.stack([random.permutation(self.people) % 2 == 0 for _ in self.signal])
        labels = traits[:, persons]
        white = np.where(labels, 1, -1).T @ self.means + self.noise(random, persons)
        tasks = tuple(f"trait {t}" for t in range(len(self.signal)))
        return Rows(_float32(white @ self.mixing), labels, persons, tasks)

    def noise(self, random: np.random.Generator, persons: NDArray[np.int64]) -> Floats:
        """Draw noise with unit variance in every coordinate, `person_share` of it by person. [rows, d]"""
        of_person = random.normal(size=(persons.max() + 1, self.d))[persons]
        of_row = random.normal(size=(len(persons), self.d))
        return np.sqrt(self.person_share) * of_person + np.sqrt(1 - self.person_share) * of_row

    def without(self, task: int, x: Tensor) -> Tensor:
        """Return x `[rows, d]` with the task's own direction ablated, which removes the trait and nothing else."""
        inverse = np.linalg.inv(self.mixing)
        direction = self.means[task] / np.linalg.norm(self.means[task])
        along = x.double().numpy() @ inverse @ direction
        return _float32(x.double().numpy() - along[:, None] * (direction @ self.mixing))

    def balanced_accuracy(self, coef: Floats, intercept: Floats, noise: float) -> Floats:
        """Return the true balanced accuracy of linear probes (coef [..., d], intercept [...]) for the only task.

        `noise` is the variance that a view adds to x's 1 in every coordinate (decay 0). Scores of a class are Gaussian,
        so its recall is the normal distribution's at (+-mean + intercept) over their standard deviation.
        """
        along = coef @ (self.means[0] @ self.mixing)
        spread = np.sqrt((1 + noise) * (coef**2).sum(axis=-1))
        return np.asarray(ndtr((along + intercept) / spread) + ndtr((along - intercept) / spread)) / 2


@dataclass(frozen=True)
class SparseWorld:
    """A few large features at a time, and traits in quiet directions.

    x = sum_j a_j f_j + sum_t +-signal u_t + noise: `active` of `features` unit vectors f_j, which share the d - tasks
    loud dimensions, with a_j uniform between 2 and 4. The u_t are orthonormal, and only the noise shares their
    dimensions. An SAE that writes the loud features into the quiet directions drowns the traits.
    """

    people: int
    d: int
    features: int
    active: int
    signal: float
    noise: float  # standard deviation in every coordinate
    n_tasks: int
    seed: int = 0  # of the directions

    def sample(self, random: np.random.Generator) -> Rows:
        """Draw new people, one mention each. Half of them have each trait."""
        loud, quiet = self._directions()
        fires = random.random((self.people, self.features)).argsort(axis=1) < self.active
        loudness = np.where(fires, random.uniform(2, 4, fires.shape), 0)
        labels = np.stack([random.permutation(self.people) % 2 == 0 for _ in quiet])
        noise = self.noise * random.normal(size=(self.people, self.d))
        x = loudness @ loud + self.signal * np.where(labels, 1, -1).T @ quiet + noise
        return Rows(_float32(x), labels, np.arange(self.people), tuple(f"trait {t}" for t in range(self.n_tasks)))

    def saes(self, tilts: Mapping[str, float]) -> dict[str, Sae]:
        """Return SAEs that know the features: a latent for each f_j, active above 1, and two for each quiet direction.

        tilts: name -> angle in degrees by which the SAE's quiet directions deviate towards the loud ones.
        """
        return {name: self._sae(name, tilt) for name, tilt in tilts.items()}

    def _sae(self, name: str, tilt: float) -> Sae:
        loud, quiet = self._directions()
        angle = np.deg2rad(tilt)
        tilted = np.cos(angle) * quiet + np.sin(angle) * loud[: self.n_tasks]
        rows = _float32(np.concatenate([loud, tilted, -tilted]))
        threshold = torch.cat([torch.ones(self.features), torch.zeros(2 * self.n_tasks)])
        coder = LinearCoder(rows, torch.zeros(len(rows)), rows, torch.zeros(self.d), Threshold(threshold))
        return Sae(name, 0, "resid_post", self.d, len(rows), None, "jumprelu", coder)

    def _directions(self) -> tuple[Floats, Floats]:
        """Return loud [features, d] and quiet [tasks, d] directions, unit vectors."""
        basis = _orthonormal(self.d, [self.seed, 0])
        crowd = np.random.default_rng([self.seed, 1]).normal(size=(self.features, self.d - self.n_tasks))
        loud = crowd / np.linalg.norm(crowd, axis=1, keepdims=True) @ basis[self.n_tasks :]
        return loud, basis[: self.n_tasks]


def zipf(people: int, rows: int) -> tuple[int, ...]:
    """Return rows of people whose sizes fall like 1 / rank, `rows` in total except for rounding."""
    shares = 1 / np.arange(1, people + 1)
    return tuple(np.maximum(1, np.round(rows * shares / shares.sum())).astype(int).tolist())


def one_large(people: int, rows: int, share: float) -> tuple[int, ...]:
    """Return rows of people, one of whom has this share of all and the others equally many."""
    others = max(1, round(rows * (1 - share) / (people - 1)))
    return (round(others * (people - 1) * share / (1 - share)), *[others] * (people - 1))


def _orthonormal(d: int, seed: list[int]) -> Floats:
    """Return a random rotation [d, d]."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def _float32(values: Floats) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
