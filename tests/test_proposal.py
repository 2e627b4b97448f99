"""Codes by the 8-bit proposal agree with float32: the same latents, and values up to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from delta_selectivity.saes import proposal
from delta_selectivity.saes.coders import LinearCoder
from delta_selectivity.saes.proposal import Proposal
from delta_selectivity.saes.row_kernels import KEYS, k_largest_of_proposed, quantise
from delta_selectivity.saes.selection import TopK
from delta_selectivity.saes.topk import exact_topk

pytestmark = pytest.mark.usefixtures("exact_bytes")

D_IN, D_SAE, K = 64, 8192, 8


@pytest.fixture(scope="module")
def encoder() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights, biases, and the mean of the inputs, which is many times their spread."""
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
    torch.testing.assert_close(
        dense(*found), dense(*plain), rtol=0, atol=2e-4
    )  # the summands have a magnitude of about 200


def test_the_latents_and_values_are_those_of_float32(encoder):
    W_enc, b_enc, centre = encoder
    x = inputs(centre)
    assert_same(Proposal.of(W_enc, b_enc, centre, K).topk(x), exact_topk(linear(x, W_enc, b_enc), K))


def test_a_loose_bound_costs_only_time(encoder):
    W_enc, b_enc, centre = encoder
    x = inputs(centre)
    found = Proposal.of(W_enc, b_enc, torch.zeros(D_IN), K).topk(x)  # the mean is rounded too
    assert_same(found, exact_topk(linear(x, W_enc, b_enc), K))


def test_latents_with_equal_bytes_are_distinguished(encoder):
    """Latents that differ by less than a step are distinguished, including those at the end of the list."""
    W_enc, b_enc, centre = encoder
    kind = torch.arange(D_SAE) // 64 * 1e-3  # 64 latents of each of 128 kinds, with a difference of a thousandth
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


def test_products_are_within_their_bound(encoder):
    W_enc, b_enc, centre = encoder
    x = inputs(centre)
    made = Proposal.of(W_enc, b_enc, centre, K)
    steps, of_rows = quantise(x.numpy(), centre.numpy(), made.column.numpy(), made.norm)
    of_rows, of_latents = torch.from_numpy(of_rows.T).double()[:, :, None], made.facts.double()
    products = torch.from_numpy(steps).double() @ made.steps.double().T
    proposed = products * of_rows[0] * of_latents[0] + of_latents[1]
    exact = x.double() @ W_enc.double().T + b_enc.double()
    off = of_rows[1] * of_latents[2] + of_rows[2] * of_latents[3] + 2.0**-22 * of_rows[3]
    assert ((proposed - exact).abs() <= off).all()
    assert 20 * (proposed - exact).square().mean().sqrt() > off.mean(), "a bound that no error comes near costs time"


def guess(
    exact: np.ndarray, centre: np.ndarray, lost_by: str, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return products, and the row and latent values that bound their error."""
    of_rows, of_latents = generator.uniform(0, 0.5, (len(exact), 4)), generator.uniform(0.1, 1, (4, len(centre)))
    of_rows[:, 0], of_latents[0], of_latents[1] = 1e-3, 1e-3, centre
    if lost_by == "rows":
        of_latents[2] *= 10  # without rounding, products are no larger than the norms allow
        of_rows[:, 2], of_latents[3] = np.abs(exact - centre).max() / of_latents[2].max(), 0
        most = np.outer(of_rows[:, 1], of_latents[2])
    else:
        of_rows[:, 1], of_rows[:, 2] = 0, 1
        of_latents[2] += np.abs(exact - centre).max()
        most = of_latents[3]
    proposed = (exact - centre + generator.uniform(-0.99, 0.99, exact.shape) * most) / 1e-6
    return proposed.round().astype(np.int32), of_rows.astype(np.float32), of_latents.astype(np.float32)


def k_largest(*of_what: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    n = len(of_what[0])
    values, places = np.empty(n * k + 1, np.float32), np.empty(n * k + 1, np.int64)
    k_largest_of_proposed(*of_what, k, values, places)
    return values[:-1].reshape(n, k), places[:-1].reshape(n, k)


@pytest.mark.parametrize("lost_by", ["rows", "latents"])
@pytest.mark.parametrize(("d", "k"), [(1, 1), (7, 7), (9, 2), (130, 8), (1000, 32), (1027, 3)])
@pytest.mark.parametrize("around", [-40.0, 0.0, 40.0])
def test_estimates_of_any_sign_and_width_find_the_largest(d: int, k: int, around: float, lost_by: str):
    generator = np.random.default_rng([d, k])
    x, weight = (generator.standard_normal(shape).astype(np.float32) for shape in ((50, 5), (d, 5)))
    bias = (around + generator.choice([0.0, 0.25], d)).astype(np.float32)
    exact = x.astype(np.float64) @ weight.T + bias
    values, places = k_largest(*guess(exact, bias, lost_by, generator), x, weight, bias, k=k)
    assert (np.sort(places) == np.sort(np.argsort(-exact)[:, :k])).all()
    np.testing.assert_allclose(values, np.take_along_axis(exact, places, 1), rtol=0, atol=1e-4)


def test_more_rows_than_the_buffer():
    generator = np.random.default_rng(5)
    rows = KEYS // 1000 * 20 + 7
    x, weight = (generator.standard_normal(shape).astype(np.float32) for shape in ((rows, 5), (1000, 5)))
    bias = np.zeros(1000, np.float32)
    exact = x.astype(np.float64) @ weight.T
    proposed, of_rows, of_latents = guess(exact, bias, "rows", generator)
    broken = np.arange(13, rows, 97)
    x[broken], of_rows[broken, 1:] = np.nan, np.nan
    values, places = k_largest(proposed, of_rows, of_latents, x, weight, bias, k=32)
    assert (np.flatnonzero(np.isnan(values).all(axis=1)) == broken).all()
    whole = np.delete(np.arange(rows), broken)
    assert (np.sort(places[whole]) == np.sort(np.argsort(-exact[whole])[:, :32])).all()
    np.testing.assert_allclose(values[whole], np.take_along_axis(exact, places, 1)[whole], rtol=0, atol=1e-5)


@pytest.mark.parametrize("largest", [0.0, 1e-38, 1.0, 1e30, 3e38, np.inf])
def test_numbers_of_any_magnitude(largest: float):
    """Covers zeros of both signs, numbers without an inverse, and numbers whose squares overflow float32."""
    x = torch.ones(3, 4)
    weight = largest * torch.linspace(-1, 1, 600)[:, None].nan_to_num() * torch.tensor([1.0, 0, 0, 0])
    weight = weight.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    bias = torch.tensor([0.0, -0.0]).repeat(300)
    expected = torch.sort(weight[:, 0] + bias, descending=True).values
    for k in (1, 7, 600):
        values, latents = Proposal.of(weight, bias, torch.zeros(4), k).topk(x)
        assert all(len(set(row)) == k for row in latents.tolist())
        if largest < np.inf:
            assert torch.equal(values.sort(dim=1, descending=True).values, expected[:k].expand(3, k))


@pytest.mark.parametrize("rows", [0, 1, 5, 700])  # 700: more than are processed at once
def test_any_number_of_rows_and_columns(rows: int):
    generator = torch.Generator().manual_seed(7)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, 7), (1027, 7), (1027,)))
    values, latents = Proposal.of(weight, bias, torch.zeros(7), 3).topk(x)
    expected = exact_topk(linear(x, weight, bias), 3)
    assert torch.equal(latents.sort(dim=1).values, expected[1].sort(dim=1).values)
    torch.testing.assert_close(values.sort(dim=1).values, expected[0].sort(dim=1).values)


def test_a_zero_column_is_accepted():
    generator = torch.Generator().manual_seed(8)
    x, weight = torch.randn(5, 8, generator=generator), torch.randn(600, 8, generator=generator)
    weight[:, 3], weight[17] = 0, 0
    x[:, 3] = 1e6
    found = Proposal.of(weight, torch.zeros(600), torch.zeros(8), 4).topk(x)
    assert torch.equal(found[1].sort(1).values, (x @ weight.T).topk(4, dim=1).indices.sort(1).values)


def test_nan_is_preserved(encoder):
    W_enc, b_enc, centre = encoder
    x = inputs(centre, rows=3)
    x[1, 5] = torch.nan
    values, _ = Proposal.of(W_enc, b_enc, centre, K).topk(x)
    assert values.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_nan_weights_behave_as_in_float32(encoder, broken: float):
    W_enc, b_enc, centre = encoder
    W_enc = W_enc.clone()
    W_enc[77, 5] = broken
    x = inputs(centre, rows=3)
    values, latents = Proposal.of(W_enc, b_enc, centre, K).topk(x)
    pre_acts = linear(x, W_enc, b_enc)
    if pre_acts.isnan().any():
        assert values.isnan().all()
    else:
        assert torch.equal(latents.sort(1).values, pre_acts.topk(K, dim=1).indices.sort(1).values)


def test_a_coder_gives_the_same_codes_with_and_without(encoder, monkeypatch: pytest.MonkeyPatch):
    W_enc, b_enc, centre = encoder
    x = inputs(centre)
    codes = []
    for fast in (True, False):
        monkeypatch.setattr(proposal, "has_fast_bytes", lambda fast=fast: fast)
        coder = LinearCoder(W_enc, b_enc, W_enc, centre, TopK(K))
        assert (coder._proposal is not None) == fast
        codes.append(coder.encode(x).to_csr().to_dense())
    torch.testing.assert_close(codes[0], codes[1], rtol=0, atol=2e-4)
    assert torch.equal(codes[0] != 0, codes[1] != 0)


@pytest.mark.parametrize(("d_sae", "k"), [(256, 8), (4096, 200)])
def test_small_or_dense_codes_use_no_proposal(d_sae: int, k: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proposal, "has_fast_bytes", lambda: True)
    assert not proposal.saves_time(torch.zeros(d_sae, 4), k)
    assert not proposal.saves_time(torch.zeros(32768, 4, dtype=torch.float16), k=8)
    assert proposal.saves_time(torch.zeros(32768, 4), k=8)
