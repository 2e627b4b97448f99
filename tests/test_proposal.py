"""Codes by proposal in bfloat16 are the codes of float32: which latents, and their values to rounding."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from sae_formats import proposal
from sae_formats.coders import LinearCoder
from sae_formats.proposal import Proposal
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


class Plain:
    """The float32 encoder, and how many rows it was asked for."""

    def __init__(self, W_enc: torch.Tensor, b_enc: torch.Tensor) -> None:
        self.W_enc, self.b_enc, self.rows = W_enc, b_enc, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        return linear(x, self.W_enc, self.b_enc)


def dense(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(values), D_SAE).scatter(1, latents, values)


def assert_same(found: tuple[torch.Tensor, torch.Tensor], plain: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(found[1].sort(dim=1).values, plain[1].sort(dim=1).values)
    torch.testing.assert_close(dense(*found), dense(*plain), rtol=0, atol=2e-4)  # what is summed is of the order of 200


def test_the_same_latents_without_a_float32_product(encoder):
    W_enc, b_enc, centre = encoder
    plain, x = Plain(W_enc, b_enc), inputs(centre)
    found = Proposal.of(W_enc, b_enc, centre, K).topk(x, plain)
    assert plain.rows == 0
    assert_same(found, exact_topk(plain(x), K))


def test_rows_that_prove_nothing_are_encoded_in_float32(encoder):
    W_enc, b_enc, centre = encoder
    plain, x = Plain(W_enc, b_enc), inputs(centre)
    found = Proposal.of(W_enc, b_enc, torch.zeros(D_IN), K).topk(x, plain)  # the mean is rounded too: a poor bound
    assert plain.rows == len(x)
    assert_same(found, exact_topk(plain(x), K))


def test_ties_at_the_end_are_no_proof(encoder):
    W_enc, b_enc, centre = encoder
    W_enc, b_enc = W_enc[:64].repeat(D_SAE // 64, 1), b_enc[:64].repeat(D_SAE // 64)  # 128 latents of each kind
    plain, x = Plain(W_enc, b_enc), inputs(centre, rows=20)
    values, _ = Proposal.of(W_enc, b_enc, centre, K).topk(x, plain)
    expected, _ = exact_topk(linear(x, W_enc, b_enc), K)
    torch.testing.assert_close(values.sort(dim=1).values, expected.sort(dim=1).values, rtol=0, atol=2e-4)
    assert plain.rows > 0


def test_the_bound_holds_for_every_latent(encoder):
    W_enc, b_enc, centre = encoder
    x = inputs(centre)
    proposed, bound = Proposal.of(W_enc, b_enc, centre, K)._propose(x)
    exact = x.double() @ W_enc.double().T + b_enc.double()
    off = (proposed.double() - exact).abs() - proposal.ROUND_OUT * proposed.double().abs()
    assert (off <= bound[:, None]).all()


def test_nan_stays_nan(encoder):
    W_enc, b_enc, centre = encoder
    x = inputs(centre, rows=3)
    x[1, 5] = torch.nan
    values, _ = Proposal.of(W_enc, b_enc, centre, K).topk(x, Plain(W_enc, b_enc))
    assert values.isnan().any(dim=1).tolist() == [False, True, False]


def test_a_coder_gives_the_same_codes_with_and_without(encoder, monkeypatch: pytest.MonkeyPatch):
    W_enc, b_enc, centre = encoder
    x = inputs(centre)
    codes = []
    for fast in (True, False):
        monkeypatch.setattr(proposal, "_has_fast_bfloat16", lambda fast=fast: fast)
        coder = LinearCoder(W_enc, b_enc, W_enc, centre, TopK(K))
        assert (coder._proposal is not None) == fast
        codes.append(coder.encode(x).to_csr().to_dense())
    torch.testing.assert_close(codes[0], codes[1], rtol=0, atol=2e-4)
    assert torch.equal(codes[0] != 0, codes[1] != 0)


@pytest.mark.parametrize(("d_sae", "k"), [(4096, 8), (8192, 64)])
def test_small_or_dense_codes_are_not_worth_it(d_sae: int, k: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proposal, "_has_fast_bfloat16", lambda: True)
    assert not proposal.is_worth_it(torch.zeros(d_sae, 4), k)
    assert not proposal.is_worth_it(torch.zeros(32768, 4, dtype=torch.float16), k=8)
    assert proposal.is_worth_it(torch.zeros(32768, 4), k=8)
