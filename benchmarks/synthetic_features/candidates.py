"""SAEs to compare: perfect, trained well and badly, broken on purpose, and adversarial.

Each candidate consists of codes of rows, and of atoms whose weighted sum is the reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.synthetic_features.result import SHUFFLED
from benchmarks.synthetic_features.training import Recipe, train
from benchmarks.synthetic_features.world import Rows, World

K = 8  # latents per row of the TopK SAEs; about as many features are active


@dataclass(frozen=True)
class Candidate:
    """An SAE, trained or constructed: x̂ = codes(rows) @ atoms + bias."""

    name: str
    codes: Callable[[Rows], Tensor]  # [rows, d_sae]; only constructed SAEs use the true activations
    atoms: Tensor  # [d_sae, d]
    bias: Tensor  # [d]
    deceives: bool = False  # adversarial: built so that delta_sel and feature recovery disagree

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Return the reconstruction [rows, d]."""
        return codes @ self.atoms + self.bias


def oracle(world: World) -> Candidate:
    """Return the true dictionary with the true codes."""
    return Candidate("oracle: true dictionary, true codes", lambda rows: rows.activations, world.directions, world.bias)


def without(world: World, lost: Tensor, name: str, deceives: bool = False) -> Candidate:
    """Return the oracle without the atoms and latents of the features `lost` (int64 [n])."""
    kept = torch.ones(len(world.directions))
    kept[lost] = 0
    atoms = world.directions * kept[:, None]
    return Candidate(name, lambda rows: rows.activations * kept, atoms, world.bias, deceives)


def missing(world: World, share: float, seed: int) -> Candidate:
    """Return the oracle without a random share of its atoms; larger shares include the smaller ones."""
    order = torch.randperm(len(world.directions), generator=torch.Generator().manual_seed(seed))
    return without(world, order[: round(share * len(order))], f"oracle without {share:.0%} of its atoms")


def only(world: World, features: Tensor) -> Candidate:
    """Return the oracle with only the atoms of the probed `features` (int64 [tasks])."""
    others = torch.ones(len(world.directions), dtype=torch.bool)
    others[features] = False
    return without(world, others.nonzero()[:, 0], "oracle with the tasks' atoms only", deceives=True)


def tied_topk(name: str, atoms: Tensor, bias: Tensor, k: int) -> Candidate:
    """Return an SAE whose atoms [d_sae, d] of length 1 both encode and decode, with the k largest codes of each row."""

    def codes(rows: Rows) -> Tensor:
        largest = ((rows.x - bias) @ atoms.T).topk(k, dim=1)
        return torch.zeros(len(rows), len(atoms)).scatter(1, largest.indices, largest.values.relu())

    return Candidate(name, codes, atoms, bias)


def random_atoms(world: World, seed: int) -> Tensor:
    """Return random directions that are independent of the world's features, [features, d]."""
    random = torch.Generator().manual_seed(_distant_seed(seed))
    return normalize(torch.randn(world.directions.shape, generator=random), dim=1)


def _distant_seed(seed: int) -> int:
    """Return a seed that is far from the world's own, because equal seeds and shapes give equal directions."""
    return seed + 10_000


def shuffled(candidate: Candidate, seed: int) -> Candidate:
    """Return the SAE with permuted decoder rows: every code writes the direction of another."""
    order = torch.randperm(len(candidate.atoms), generator=torch.Generator().manual_seed(seed))
    return replace(candidate, name=candidate.name + SHUFFLED, atoms=candidate.atoms[order])


def rotated(world: World, seed: int) -> Candidate:
    """Return a rotation of x as x̂: nothing is lost, but all directions change."""
    d = world.directions.shape[1]
    rotation = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(_distant_seed(seed))))[0]
    exact = oracle(world)
    return replace(
        exact, name="oracle, rotated", atoms=exact.atoms @ rotation, bias=exact.bias @ rotation, deceives=True
    )


def absorbed(world: World) -> Candidate:
    """Return the oracle with absorption: a child's latent also writes the parent's direction and silences the parent.

    Sparsity rewards this if one feature implies another (feature absorption, arXiv 2409.14507).
    """
    atoms = world.directions.clone()
    for parent, children in world.children.items():
        atoms[list(children)] += world.directions[parent]

    def codes(rows: Rows) -> Tensor:
        latents = rows.activations.clone()
        for parent, children in world.children.items():
            fires = (rows.activations[:, list(children)] > 0).any(dim=1)
            latents[fires, parent] = 0
        return latents

    return Candidate("oracle, parents absorbed by children", codes, atoms, world.bias, deceives=True)


def trained(name: str, recipe: Recipe, x: Tensor, seed: int) -> Candidate:
    """Return an SAE trained on activations x [rows, d]."""
    sae = train(recipe, x, seed)
    atoms = sae.W_dec.data
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):  # SAE Lens divides in the decoder
        atoms = normalize(atoms, dim=1)
    return Candidate(name, partial(_encode, sae), atoms, sae.b_dec.data)


def _encode(sae: Any, rows: Rows) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(sae.encode(rows.x))


def recipes(n_features: int, d: int) -> Sequence[tuple[str, Recipe]]:
    """Return architectures and qualities. Widths equal the number of true features unless the name says otherwise."""
    topk = {"k": K}
    return (
        ("TopK", Recipe("topk", n_features, 1200, topk)),
        ("TopK, 300 steps", Recipe("topk", n_features, 300, topk)),
        ("TopK, 100 steps", Recipe("topk", n_features, 100, topk)),
        ("TopK, 40 steps", Recipe("topk", n_features, 40, topk)),
        ("TopK, k 2", Recipe("topk", n_features, 800, {"k": 2})),
        (f"TopK, {d} latents", Recipe("topk", d, 800, topk)),
        ("BatchTopK", Recipe("batchtopk", n_features, 1200, topk)),
        ("JumpReLU", Recipe("jumprelu", n_features, 1200, {"l0_coefficient": 0.1})),
        ("JumpReLU, too sparse", Recipe("jumprelu", n_features, 800, {"l0_coefficient": 0.5})),
        ("ReLU, L1", Recipe("standard", n_features, 1200, {"l1_coefficient": 0.3})),
        ("ReLU, L1 too strong", Recipe("standard", n_features, 800, {"l1_coefficient": 1.5})),
    )


def all_candidates(world: World, x: Tensor, features: Tensor, seed: int) -> list[Candidate]:
    """Return every SAE of the table; x [rows, d]: training rows, `features` [tasks]: probed features."""
    n_features, d = world.directions.shape
    learned = [trained(name, recipe, x, seed) for name, recipe in recipes(n_features, d)]
    broken = [
        shuffled(learned[0], seed),
        tied_topk(f"random dictionary, TopK encoder, k {K}", random_atoms(world, seed), world.bias, K),
    ]
    deceivers = [rotated(world, seed), only(world, features), absorbed(world)]
    true_atoms = tied_topk(f"true dictionary, TopK encoder, k {K}", world.directions, world.bias, K)
    incomplete = [missing(world, share, seed) for share in (0.1, 0.25, 0.5)]
    return [oracle(world), true_atoms, *incomplete, *learned, *broken, *deceivers]
