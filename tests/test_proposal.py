"""Codes by proposal in bfloat16 are the codes of float32: which latents, and their values to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from sae_formats import proposal
from sae_formats.coders import LinearCoder
from sae_formats.proposal import Proposal
from sae_formats.row_kernels import ROUND_BFLOAT16, _least_that_may_be, k_largest_of_proposed
from sae_formats.selection import TopK
from sae_formats.topk import exact_topk

D_IN, D_SAE, K = 64, 8192, 8


@pytest.fixture(scope="module")
def encoder() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, biases and the mean of inputs, which is many times their spread."""
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(D_SAE, D_IN, generator=generator) / 8
    centre = 20 * torch.randn(D_IN, generator=generator)
    b_enc = 0.1 * torch.randn(D_SAE, generator=generator) - W_enc @ centre
    return W_enc, b_enc, centre


def inputs(centre: torch.Tensor, rows: int = 60) -> torch.Tensor:
    return centre + torch.randn(rows, len(centre), generator=torch.Generator().manual_seed(1))


def dense(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(values), D_SAE).scatter(1, latents, values)


def assert_same(found: tuple[torch.Tensor, torch.Tensor], plain: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(found[1].sort(dim=1).values, plain[1].sort(dim=1).values)
    torch.testing.assert_close(dense(*found), dense(*plain), rtol=0, atol=2e-4)  # what is summed is of the order of 200


def test_the_latents_and_values_are_those_of_float32(encoder):
    W_enc, b_enc, centre = encoder
    x = inputs(centre)
    assert_same(Proposal.of(W_enc, b_enc, centre, K).topk(x), exact_topk(linear(x, W_enc, b_enc), K))


def test_a_poor_bound_costs_time_and_nothing_else(encoder):
    W_enc, b_enc, centre = encoder
    x = inputs(centre)
    found = Proposal.of(W_enc, b_enc, torch.zeros(D_IN), K).topk(x)  # the mean is rounded too
    assert_same(found, exact_topk(linear(x, W_enc, b_enc), K))


def test_what_bfloat16_takes_for_equal_is_told_apart(encoder):
    """Of latents that differ by less than bfloat16 resolves, those at the end of the list among them."""
    W_enc, b_enc, centre = encoder
    kind = torch.arange(D_SAE) // 64 * 1e-3  # 64 latents of each of 128 kinds, a thousandth apart
    W_enc = W_enc[:64].repeat(D_SAE // 64, 1)
    b_enc = 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(2)).repeat(D_SAE // 64) - W_enc @ centre
    x = inputs(centre, rows=20)
    values, latents = Proposal.of(W_enc, b_enc + kind, centre, K).topk(x)
    exact = (x.double() @ W_enc.double().T + (b_enc + kind).double()).topk(K, dim=1)
    torch.testing.assert_close(values.sort(1, descending=True).values, exact.values.float(), rtol=0, atol=2e-4)
    assert (latents.sort(1).values == exact.indices.sort(1).values).double().mean() > 0.95


def test_ties_beyond_k_leave_k_different_latents(encoder):
    W_enc, b_enc, centre = encoder
    W_enc, b_enc = W_enc[:64].repeat(D_SAE // 64, 1), b_enc[:64].repeat(D_SAE // 64)  # 128 latents of each kind
    x = inputs(centre, rows=20)
    values, latents = Proposal.of(W_enc, b_enc, centre, K).topk(x)
    expected, _ = exact_topk(linear(x, W_enc, b_enc), K)
    torch.testing.assert_close(values.sort(dim=1).values, expected.sort(dim=1).values, rtol=0, atol=2e-4)
    assert all(len(set(row)) == K for row in latents.tolist())


def test_the_bound_holds_for_every_latent(encoder):
    W_enc, b_enc, centre = encoder
    x = inputs(centre)
    proposed, bound = Proposal.of(W_enc, b_enc, centre, K).propose(x)
    exact = x.double() @ W_enc.double().T + b_enc.double()
    off = (proposed.double() - exact).abs() - float(ROUND_BFLOAT16) * proposed.double().abs()
    assert (off <= torch.from_numpy(bound)[:, None]).all()


@pytest.mark.parametrize(("d", "k"), [(1, 1), (7, 7), (9, 2), (130, 8), (1000, 32), (1027, 3)])
@pytest.mark.parametrize("around", [-40.0, 0.0, 40.0])
def test_a_guess_of_any_sign_and_width_finds_the_largest(d: int, k: int, around: float):
    generator = np.random.default_rng([d, k])
    x, weight = (generator.standard_normal(shape).astype(np.float32) for shape in ((50, 5), (d, 5)))
    bias = (around + generator.choice([0.0, 0.25], d)).astype(np.float32)
    exact = x.astype(np.float64) @ weight.T + bias
    off = generator.uniform(0, 0.5, 50).astype(np.float32)
    guess = torch.from_numpy(exact + generator.uniform(-0.99, 0.99, exact.shape) * off[:, None]).float().bfloat16()
    values, places = k_largest_of_proposed(guess.view(torch.int16).numpy(), off, x, weight, bias, k)
    assert (np.sort(places) == np.sort(np.argsort(-exact)[:, :k])).all()
    np.testing.assert_allclose(values, np.take_along_axis(exact, places, 1), rtol=0, atol=1e-4)


def test_of_more_rows_than_are_held_back_each_has_its_own():
    generator = np.random.default_rng(5)
    x, weight = (generator.standard_normal(shape).astype(np.float32) for shape in ((700, 5), (1000, 5)))
    exact = x.astype(np.float64) @ weight.T
    off = np.full(700, 0.1, np.float32)
    guess = torch.from_numpy(exact + generator.uniform(-0.09, 0.09, exact.shape)).float().bfloat16()
    broken = np.arange(13, 700, 97)
    x[broken], off[broken] = np.nan, np.nan
    bits = guess.view(torch.int16).numpy()
    values, places = k_largest_of_proposed(bits, off, x, weight, np.zeros(1000, np.float32), 32)
    assert (np.flatnonzero(np.isnan(values).all(axis=1)) == broken).all()
    whole = np.delete(np.arange(700), broken)
    assert (np.sort(places[whole]) == np.sort(np.argsort(-exact[whole])[:, :32])).all()
    np.testing.assert_allclose(values[whole], np.take_along_axis(exact, places, 1)[whole], rtol=0, atol=1e-5)


def test_guesses_of_zero_and_infinity_are_numbers_like_others():
    x, off = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    assert _least_that_may_be(np.float32(np.inf), np.float32(1)) == -np.inf  # no NaN, whose sign would decide
    weight = np.array([[-1.0], [-0.0], [0.0], [-0.0], [3e38], [-3e38]], np.float32)
    for guess in (
        [-1.0, -0.0, 0.0, -0.0, torch.inf, -torch.inf],
        [-1.0, 0.0, -0.0, 0.0, 3e38, -3e38],
        [torch.inf] * 6,
        [-torch.inf] * 6,
    ):
        bits = torch.tensor([guess], dtype=torch.bfloat16).view(torch.int16).numpy()
        for k in range(1, 7):
            values, places = k_largest_of_proposed(bits, off, x, weight, np.zeros(6, np.float32), k)
            assert len({*places[0].tolist()}) == k
            assert sorted(values[0].tolist()) == sorted(weight[:, 0].tolist())[6 - k :]


def test_nan_stays_nan(encoder):
    W_enc, b_enc, centre = encoder
    x = inputs(centre, rows=3)
    x[1, 5] = torch.nan
    values, _ = Proposal.of(W_enc, b_enc, centre, K).topk(x)
    assert values.isnan().any(dim=1).tolist() == [False, True, False]


def test_a_coder_gives_the_same_codes_with_and_without(encoder, monkeypatch: pytest.MonkeyPatch):
    W_enc, b_enc, centre = encoder
    x = inputs(centre)
    codes = []
    for fast in (True, False):
        monkeypatch.setattr(proposal, "has_fast_bfloat16", lambda fast=fast: fast)
        coder = LinearCoder(W_enc, b_enc, W_enc, centre, TopK(K))
        assert (coder._proposal is not None) == fast
        codes.append(coder.encode(x).to_csr().to_dense())
    torch.testing.assert_close(codes[0], codes[1], rtol=0, atol=2e-4)
    assert torch.equal(codes[0] != 0, codes[1] != 0)


@pytest.mark.parametrize(("d_sae", "k"), [(512, 8), (4096, 200)])
def test_small_or_dense_codes_are_not_worth_it(d_sae: int, k: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proposal, "has_fast_bfloat16", lambda: True)
    assert not proposal.is_worth_it(torch.zeros(d_sae, 4), k)
    assert not proposal.is_worth_it(torch.zeros(32768, 4, dtype=torch.float16), k=8)
    assert proposal.is_worth_it(torch.zeros(32768, 4), k=8)
