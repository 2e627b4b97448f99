"""The SAEs that are to be told apart: perfect, trained well and badly, broken on purpose, and built to deceive.

All of them are one thing here: codes of rows, and atoms that the reconstruction is a sum of.
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

K = 8  # latents a row of the TopK SAEs; about as many features fire


@dataclass(frozen=True)
class Candidate:
    """An SAE, trained or constructed: x̂ = codes(rows) @ atoms + bias."""

    name: str
    codes: Callable[[Rows], Tensor]  # [rows, d_sae]; only constructions look at the true activations
    atoms: Tensor  # [d_sae, d]
    bias: Tensor  # [d]
    deceives: bool = False  # built so that delta_sel and feature recovery must disagree

    def reconstruct(self, codes: Tensor) -> Tensor:
        """[rows, d]"""
        return codes @ self.atoms + self.bias


def oracle(world: World) -> Candidate:
    """The true dictionary with the true codes."""
    return Candidate("oracle: true dictionary, true codes", lambda rows: rows.activations, world.directions, world.bias)


def without(world: World, lost: Tensor, name: str, deceives: bool = False) -> Candidate:
    """The oracle without the atoms and latents of the features `lost` (int64 [n])."""
    kept = torch.ones(len(world.directions))
    kept[lost] = 0
    atoms = world.directions * kept[:, None]
    return Candidate(name, lambda rows: rows.activations * kept, atoms, world.bias, deceives)


def missing(world: World, share: float, seed: int) -> Candidate:
    """The oracle without a share of its atoms, drawn at random; with a larger share the same ones and others."""
    order = torch.randperm(len(world.directions), generator=torch.Generator().manual_seed(seed))
    return without(world, order[: round(share * len(order))], f"oracle without {share:.0%} of its atoms")


def only(world: World, features: Tensor) -> Candidate:
    """The oracle with no atoms but those of `features` (int64 [tasks]), which are probed for."""
    others = torch.ones(len(world.directions), dtype=torch.bool)
    others[features] = False
    return without(world, others.nonzero()[:, 0], "oracle with the tasks' atoms only", deceives=True)


def tied_topk(name: str, atoms: Tensor, bias: Tensor, k: int) -> Candidate:
    """Atoms [d_sae, d] of length 1 that encode and decode alike, the k largest of each row."""

    def codes(rows: Rows) -> Tensor:
        largest = ((rows.x - bias) @ atoms.T).topk(k, dim=1)
        return torch.zeros(len(rows), len(atoms)).scatter(1, largest.indices, largest.values.relu())

    return Candidate(name, codes, atoms, bias)


def random_atoms(world: World, seed: int) -> Tensor:
    """Directions that have nothing to do with the world's, [features, d]."""
    random = torch.Generator().manual_seed(_apart(seed))
    return normalize(torch.randn(world.directions.shape, generator=random), dim=1)


def _apart(seed: int) -> int:
    """A seed far from the world's own: from the same one, in the same shape, come the same directions."""
    return seed + 10_000


def shuffled(candidate: Candidate, seed: int) -> Candidate:
    """Decoder rows permuted: every code writes the direction of another."""
    order = torch.randperm(len(candidate.atoms), generator=torch.Generator().manual_seed(seed))
    return replace(candidate, name=candidate.name + SHUFFLED, atoms=candidate.atoms[order])


def rotated(world: World, seed: int) -> Candidate:
    """x̂ is a rotation of x: nothing is lost, nothing is where it was."""
    d = world.directions.shape[1]
    rotation = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(_apart(seed))))[0]
    exact = oracle(world)
    return replace(
        exact, name="oracle, rotated", atoms=exact.atoms @ rotation, bias=exact.bias @ rotation, deceives=True
    )


def absorbed(world: World) -> Candidate:
    """A child's latent writes its parent's direction too, and the parent's own stays silent beside it.

    What sparsity rewards where one feature implies another (feature absorption, arXiv 2409.14507).
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
    """An SAE trained on activations x [rows, d]."""
    sae = train(recipe, x, seed)
    atoms = sae.W_dec.data
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):  # SAE Lens divides when it decodes
        atoms = normalize(atoms, dim=1)
    return Candidate(name, partial(_encode, sae), atoms, sae.b_dec.data)


def _encode(sae: Any, rows: Rows) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(sae.encode(rows.x))


def recipes(n_features: int, d: int) -> Sequence[tuple[str, Recipe]]:
    """Architectures and qualities. Widths are the number of true features unless the name says otherwise."""
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
    """Every SAE of the table; x [rows, d] to train on, `features` [tasks] that are probed for."""
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
