"""The streamed figures compared with NumPy on the whole matrix, for any batching."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from delta_selectivity.run.reconstruction import (
    ALL,
    Reconstruction,
    ReconstructionSums,
    SiteScale,
    TokenFacts,
    _add_fired,
    _compare,
    _compare_on_cpu,
    _ErrorSums,
    _merge,
    _merge_on_cpu,
)
from delta_selectivity.saes import SparseRows

D_IN, D_SAE, ROWS = 24, 40, 600


def make_codes(rows: int, k: int = 5, seed: int = 1) -> SparseRows:
    """Return k entries per row, a third of them zero; latents 30 and above never fire."""
    rng = torch.Generator().manual_seed(seed)
    col = torch.rand(rows, 30, generator=rng).topk(k).indices.flatten()
    value = (3 * torch.rand(rows * k, generator=rng) - 1).relu()
    return SparseRows(torch.arange(0, rows * k + 1, k), col, value, D_SAE)


def make_rows(mean: float, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = mean + spread * torch.randn(ROWS, D_IN, generator=rng)
    x[:, 3] += 50 * mean  # a dimension with a large norm
    return x, x + 0.3 * spread * torch.randn(ROWS, D_IN, generator=rng)


def facts(x: Tensor, rows: Tensor, outlying: Tensor | None = None) -> TokenFacts:
    """Return the token values of tokens with these numbers."""
    return TokenFacts.of(x[rows], rows, None)._replace(outlying=None if outlying is None else outlying[rows])


def stream(
    x: Tensor, recon: Tensor, codes: SparseRows, sizes: list[int], outlying: Tensor | None = None
) -> Reconstruction:
    """Stream every row as a token; every third is probed too."""
    sums = ReconstructionSums.empty(D_IN, D_SAE, "cpu")
    for rows in torch.arange(len(x)).split(sizes):
        sums.whole[ALL].add(x[rows], recon[rows], codes.select(rows), facts(x, rows, outlying), len(rows))
        probed = rows[rows % 3 == 0]
        sums.probed.add(x[probed], recon[probed], codes.select(probed))
    return sums.figures()


def whole_matrix(x: np.ndarray, recon: np.ndarray) -> tuple[float, float, float]:
    """Compute mse, fvu and cosine in float64."""
    x, recon = x.astype(np.float64), recon.astype(np.float64)
    error, deviation = (x - recon) ** 2, (x - x.mean(0)) ** 2
    cosine = (x * recon).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(recon, axis=1)
    return error.mean(), error.sum() / deviation.sum(), cosine.mean()


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (1e3, 1.0), (-1e3, 1.0), (1.0, 1e-3)])
@pytest.mark.parametrize("sizes", [[ROWS], [1, ROWS - 1], [41] * 14 + [26], [0, 300, 0, 299, 1]])
def test_figures_equal_numpy_for_any_batching(mean: float, spread: float, sizes: list[int]) -> None:
    x, recon = make_rows(mean, spread)
    codes = make_codes(ROWS)
    figures = stream(x, recon, codes, sizes)
    value = codes.value.view(ROWS, -1)
    fired = np.unique(codes.col[codes.value != 0])
    mse_whole, fvu_whole, _ = whole_matrix(x.numpy(), recon.numpy())
    mse_pos, fvu_pos, cosine = whole_matrix(x[::3].numpy(), recon[::3].numpy())
    expected = Reconstruction(
        mse_pos=mse_pos,
        mse_whole=mse_whole,
        mse_whole_se=0,
        fvu_pos=fvu_pos,
        fvu_whole=fvu_whole,
        fvu_whole_se=0,
        fvu_ordinary=fvu_whole,
        outliers=0,
        cosine=cosine,
        l0=(value[::3] != 0).sum(1).double().mean().item(),
        l1=value[::3].double().sum(1).mean().item(),
        dead=1 - len(fired) / D_SAE,
        dead_se=0,
        n_probed=ROWS // 3,
        n_tokens=ROWS,
        n_tokens_all=ROWS,
    )
    assert 10 / D_SAE <= expected.dead < 1  # type: ignore[operator]
    assert asdict(figures) == pytest.approx(asdict(expected), rel=1e-6)


def test_merge_is_the_sum_of_the_parts() -> None:
    x, recon = make_rows(1e3)
    outlying = torch.arange(ROWS) % 50 == 7
    codes, whole = make_codes(ROWS), ReconstructionSums.empty(D_IN, D_SAE, "cpu")
    parts = []
    for rows in torch.arange(ROWS).split([100, 450, 50]):
        part = ReconstructionSums.empty(D_IN, D_SAE, "cpu")
        for sums in (whole, part):
            sums.whole[ALL].add(x[rows], recon[rows], codes.select(rows), facts(x, rows, outlying), 2 * len(rows))
            sums.probed.add(x[rows], recon[rows], codes.select(rows))
        parts.append(part)
    before = asdict(parts[0].figures())
    merged = parts[0].merge(parts[1]).merge(parts[2].to("cpu")).merge(ReconstructionSums.empty(D_IN, D_SAE, "cpu"))
    assert asdict(merged.figures()) == pytest.approx(asdict(whole.figures()), rel=1e-12)
    assert asdict(parts[0].figures()) == before  # merging creates a new one


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, ROWS])
def test_the_cpu_path_equals_the_general_one(mean: float, rows: int) -> None:
    x, recon = (whole[:rows] for whole in make_rows(mean))
    for chosen in (None, torch.arange(rows) % 4 != 1):
        given = x.clone(), recon.clone()
        if chosen is not None:  # what is left out changes nothing, whatever it is
            given[0][~chosen], given[1][~chosen] = torch.nan, torch.inf
        ours, theirs = _compare_on_cpu(*given, chosen), _compare(*given, chosen)
        assert [one.dtype for one in ours] == [one.dtype for one in theirs]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    parts = [_ErrorSums.of(part, 0.9 * part)[0] for part in (x, x[: rows // 2 + 1] + 1)]
    for ours, theirs in zip(_merge_on_cpu(*parts), _merge(*parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_a_row_with_a_broken_number_has_a_broken_error(value: float, side: int) -> None:
    both = make_rows(1e3)
    both[side][70, 5] = value
    for compare in (_compare, _compare_on_cpu):
        _, errors, *_ = compare(*both, None)
        assert (~errors.isfinite()).nonzero().flatten().tolist() == [70]


def test_a_perfect_reconstruction_has_no_error() -> None:
    x, _ = make_rows(1e3)
    figures = stream(x, x, make_codes(ROWS), [ROWS])
    assert (figures.mse_pos, figures.fvu_pos, figures.mse_whole, figures.fvu_whole) == (0, 0, 0, 0)
    assert figures.cosine == pytest.approx(1)


def test_reconstructing_the_mean_has_fvu_one() -> None:
    x, _ = make_rows(10)
    assert stream(x, x.double().mean(0).float().expand_as(x), make_codes(ROWS), [ROWS]).fvu_whole == pytest.approx(1)


def test_figures_without_tokens_are_none() -> None:
    figures = ReconstructionSums.empty(D_IN, D_SAE, "cpu").figures()
    assert (figures.n_probed, figures.n_tokens) == (0, 0)
    assert set(asdict(figures).values()) == {0, None}
    assert (figures.fvu_whole_se, figures.dead, figures.outliers) == (None, None, None)
    x = torch.ones(3, D_IN)
    same = stream(x, x + 1, make_codes(3), [3])
    assert same.mse_whole == pytest.approx(1)
    assert (same.fvu_whole, same.fvu_pos) == (None, None)  # no variance to explain


def test_half_precision_activations_are_summed_in_float32() -> None:
    x, recon = make_rows(0.0)
    codes = make_codes(ROWS)
    half = stream(x.bfloat16(), recon, codes, [200, 400])
    expected = stream(x.bfloat16().float(), recon, codes, [ROWS])
    assert asdict(half) == pytest.approx(asdict(expected), rel=1e-6)


@pytest.mark.parametrize("latent", [-1, D_SAE])
def test_an_invalid_latent_is_an_error(latent: int) -> None:
    x, recon = make_rows(0.0)
    codes = make_codes(ROWS)
    codes.col[7] = latent
    with pytest.raises(IndexError):
        ReconstructionSums.empty(D_IN, D_SAE, "cpu").whole[ALL].add(x, recon, codes, facts(x, torch.arange(ROWS)), ROWS)


@pytest.mark.parametrize("chosen", [None, torch.arange(ROWS) % 4 != 1])
def test_firing_latents_are_recorded_on_every_device(chosen: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, number = make_codes(ROWS), torch.arange(ROWS) * 2**32
    here, there = torch.zeros(2, 2, D_SAE, dtype=torch.int64)
    _add_fired(number, codes, here, chosen)
    dense = torch.zeros(ROWS, D_SAE).scatter_add_(1, codes.col.view(ROWS, -1), codes.value.view(ROWS, -1))
    counted = (dense != 0) & (torch.tensor(True) if chosen is None else chosen[:, None])
    assert torch.equal(here, torch.stack([counted.sum(0), (counted * number[:, None]).sum(0)]))
    monkeypatch.setattr(torch.Tensor, "device", torch.device("meta"))  # only its type is checked
    _add_fired(number, codes, there, chosen)
    monkeypatch.undo()
    assert torch.equal(here, there)


@pytest.mark.parametrize("has_outliers", [False, True])
def test_chosen_tokens_give_the_sums_of_these_tokens_alone(has_outliers: bool) -> None:
    x, recon = make_rows(1e3)
    codes, every, chosen = make_codes(ROWS), torch.arange(ROWS), torch.arange(ROWS) % 4 != 1
    outlying = every % 50 == 7 if has_outliers else None
    all_facts = facts(x, every, outlying)
    rows = every[chosen]
    of_some = all_facts._replace(
        number=rows, distance=all_facts.distance[rows], outlying=None if outlying is None else outlying[rows]
    )
    found, expected = (ReconstructionSums.empty(D_IN, D_SAE, "cpu") for _ in range(2))
    errors = found.whole[ALL].add(x, recon, codes, all_facts, 2 * ROWS, chosen)
    of_rows = expected.whole[ALL].add(x[rows], recon[rows], codes.select(rows), of_some, 2 * ROWS)
    assert torch.equal(errors[chosen], of_rows) and not errors[~chosen].any()
    for sums in (found, expected):
        sums.probed.add(x, recon, codes)
    assert asdict(found.figures()) == pytest.approx(asdict(expected.figures()), rel=1e-12)


def test_outliers_are_excluded_from_fvu_ordinary_and_counted() -> None:
    """A fiftieth of the tokens are sinks: 100 times as long, and badly reconstructed."""
    x, recon = make_rows(0.0)
    sink = torch.arange(ROWS) % 50 == 7
    x[sink] = 100 + x[sink]
    recon[sink] = 0
    figures = stream(x, recon, make_codes(ROWS), [41] * 14 + [26], sink)
    _, fvu_whole, _ = whole_matrix(x.numpy(), recon.numpy())
    _, fvu_ordinary, _ = whole_matrix(x[~sink].numpy(), recon[~sink].numpy())
    assert figures.fvu_whole == pytest.approx(fvu_whole, rel=1e-6)
    assert figures.fvu_ordinary == pytest.approx(fvu_ordinary, rel=1e-6)
    assert figures.outliers == 0.02
    assert fvu_whole > 1 > 2 * fvu_ordinary


# --- standard errors of a sample


def world(
    rng: np.random.Generator, lengths: np.ndarray, d_sae: int = 200
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """Return tokens of texts with errors correlated within a text, a few sinks, and latents of all frequencies.

    x and x̂ [tokens, d], the text of each token, and which latents fire [tokens, d_sae].
    """
    text = np.repeat(np.arange(len(lengths)), lengths)
    n = len(text)
    hard = rng.gamma(4, 0.25, len(lengths))[text] * rng.gamma(4, 0.25, n)
    x = rng.normal(size=(n, D_IN)) + rng.normal(size=(len(lengths), D_IN))[text] * 0.5
    sinks = rng.random(n) < 0.01
    x[sinks] = 20 + rng.normal(size=(sinks.sum(), D_IN))
    recon = x + 0.4 * np.sqrt(hard)[:, None] * rng.normal(size=(n, D_IN))
    fires = rng.random((n, d_sae)) < np.geomspace(0.1, 1e-5, d_sae)
    return torch.from_numpy(x).float(), torch.from_numpy(recon).float(), text, fires


def sampled(x: Tensor, recon: Tensor, text: np.ndarray, fires: np.ndarray, share: float, seed: int) -> Reconstruction:
    """Return the figures of a sample, in batches of some 500 tokens in whole texts."""
    rng = np.random.default_rng(seed)
    drawn = rng.random(len(text)) < share
    sums = ReconstructionSums.empty(D_IN, fires.shape[1], "cpu")
    for rows in np.split(np.arange(len(text)), np.flatnonzero(np.diff(text // 25)) + 1):
        some = rows[drawn[rows]]
        _, col = fires[some].nonzero()
        crow = torch.from_numpy(np.concatenate([[0], np.cumsum(fires[some].sum(1))]))
        codes = SparseRows(crow, torch.from_numpy(col), torch.ones(len(col)), fires.shape[1])
        tokens = TokenFacts.of(x[some], torch.from_numpy(some), SiteScale(x[:500].mean(dim=0), np.inf))
        sums.whole[ALL].add(x[some], recon[some], codes, tokens, len(rows))
    return sums.figures()


@pytest.mark.parametrize(("n_texts", "length", "share"), [(1500, 20, 0.1), (1500, 20, 0.5), (60, 400, 0.1)])
def test_intervals_of_a_sample_cover_the_figures_of_all_tokens(n_texts: int, length: int, share: float) -> None:
    """60 samples: the coverage of 95 % intervals is within binomial error, and they are not much too wide."""
    rng = np.random.default_rng(n_texts)
    x, recon, text, fires = world(rng, rng.poisson(length, n_texts) + 1)
    exact = sampled(x, recon, text, fires, 1.0, 0)
    assert (exact.n_tokens, exact.fvu_whole_se, exact.mse_whole_se, exact.dead_se) == (len(text), 0, 0, 0)
    found = [sampled(x, recon, text, fires, share, seed) for seed in range(60)]
    for name in ("mse_whole", "fvu_whole"):
        truth = getattr(exact, name)
        value, se = (np.array([getattr(one, part) for one in found]) for part in (name, f"{name}_se"))
        assert (
            np.mean(np.abs(value - truth) < 1.96 * se) > 0.85
        )  # 51 of 60: with a true 0.95, the probability is 1 in 1000
        assert np.mean(se) < 1.3 * np.std(value - truth)
    dead, se = (np.array([getattr(one, part) for one in found]) for part in ("dead", "dead_se"))
    assert np.std(dead) < 1.2 * np.mean(se) < 4 * np.std(dead)
    assert {one.n_tokens_all for one in found} == {len(text)}
