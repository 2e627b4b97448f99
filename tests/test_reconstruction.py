"""The streamed figures against NumPy on the whole matrix, however it is cut."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from delta_selectivity.run.reconstruction import (
    Reconstruction,
    ReconstructionSums,
    _compare,
    _compare_on_cpu,
    _ErrorSums,
    _merge,
    _merge_on_cpu,
)
from delta_selectivity.saes import SparseRows

D_IN, D_SAE, ROWS = 24, 40, 600


def make_codes(rows: int, k: int = 5, seed: int = 1) -> SparseRows:
    """k entries a row, a third of them zero; latents 30 and above never fire."""
    rng = torch.Generator().manual_seed(seed)
    col = torch.rand(rows, 30, generator=rng).topk(k).indices.flatten()
    value = (3 * torch.rand(rows * k, generator=rng) - 1).relu()
    return SparseRows(torch.arange(0, rows * k + 1, k), col, value, D_SAE)


def make_rows(mean: float, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = mean + spread * torch.randn(ROWS, D_IN, generator=rng)
    x[:, 3] += 50 * mean  # a dimension with a huge norm
    return x, x + 0.3 * spread * torch.randn(ROWS, D_IN, generator=rng)


def stream(x: Tensor, recon: Tensor, codes: SparseRows, sizes: list[int]) -> Reconstruction:
    """Every row is a token; every third is probed too."""
    sums = ReconstructionSums.empty(D_IN, D_SAE, "cpu")
    for rows in torch.arange(len(x)).split(sizes):
        sums.add_whole(x[rows], recon[rows], codes.select(rows))
        probed = rows[rows % 3 == 0]
        sums.add_probed(x[probed], recon[probed], codes.select(probed))
    return sums.figures()


def whole_matrix(x: np.ndarray, recon: np.ndarray) -> tuple[float, float, float]:
    """mse, fvu, cosine in float64."""
    x, recon = x.astype(np.float64), recon.astype(np.float64)
    error, deviation = (x - recon) ** 2, (x - x.mean(0)) ** 2
    cosine = (x * recon).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(recon, axis=1)
    return error.mean(), error.sum() / deviation.sum(), cosine.mean()


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (1e3, 1.0), (-1e3, 1.0), (1.0, 1e-3)])
@pytest.mark.parametrize("sizes", [[ROWS], [1, ROWS - 1], [41] * 14 + [26], [0, 300, 0, 299, 1]])
def test_equals_numpy_however_it_is_cut(mean: float, spread: float, sizes: list[int]) -> None:
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
        fvu_pos=fvu_pos,
        fvu_whole=fvu_whole,
        cosine=cosine,
        l0=(value[::3] != 0).sum(1).double().mean().item(),
        l1=value[::3].double().sum(1).mean().item(),
        dead=1 - len(fired) / D_SAE,
        n_probed=ROWS // 3,
        n_tokens=ROWS,
    )
    assert 10 / D_SAE <= expected.dead < 1  # type: ignore[operator]
    assert asdict(figures) == pytest.approx(asdict(expected), rel=1e-6)


def test_merge_is_the_sum_of_the_parts() -> None:
    x, recon = make_rows(1e3)
    codes, whole = make_codes(ROWS), ReconstructionSums.empty(D_IN, D_SAE, "cpu")
    parts = []
    for rows in torch.arange(ROWS).split([100, 450, 50]):
        part = ReconstructionSums.empty(D_IN, D_SAE, "cpu")
        for sums in (whole, part):
            sums.add_whole(x[rows], recon[rows], codes.select(rows))
            sums.add_probed(x[rows], recon[rows], codes.select(rows))
        parts.append(part)
    before = asdict(parts[0].figures())
    merged = parts[0].merge(parts[1]).merge(parts[2].to("cpu")).merge(ReconstructionSums.empty(D_IN, D_SAE, "cpu"))
    assert asdict(merged.figures()) == pytest.approx(asdict(whole.figures()), rel=1e-12)
    assert asdict(parts[0].figures()) == before  # a merge makes a new one


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, ROWS])
def test_on_a_cpu_and_elsewhere_it_is_the_same(mean: float, rows: int) -> None:
    x, recon = (whole[:rows] for whole in make_rows(mean))
    for ours, theirs in zip(_compare_on_cpu(x, recon), _compare(x, recon), strict=True):
        assert ours.dtype == theirs.dtype
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
        errors, *_ = compare(*both)
        assert (~errors.isfinite()).nonzero().flatten().tolist() == [70]


def test_a_perfect_reconstruction_has_no_error() -> None:
    x, _ = make_rows(1e3)
    figures = stream(x, x, make_codes(ROWS), [ROWS])
    assert (figures.mse_pos, figures.fvu_pos, figures.mse_whole, figures.fvu_whole) == (0, 0, 0, 0)
    assert figures.cosine == pytest.approx(1)


def test_the_mean_as_reconstruction_leaves_all_variance() -> None:
    x, _ = make_rows(10)
    assert stream(x, x.double().mean(0).float().expand_as(x), make_codes(ROWS), [ROWS]).fvu_whole == pytest.approx(1)


def test_nothing_seen_is_none_and_never_nan() -> None:
    figures = ReconstructionSums.empty(D_IN, D_SAE, "cpu").figures()
    assert (figures.n_probed, figures.n_tokens) == (0, 0)
    assert set(asdict(figures).values()) == {0, None}
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
def test_a_latent_that_there_is_not_is_an_error(latent: int) -> None:
    x, recon = make_rows(0.0)
    codes = make_codes(ROWS)
    codes.col[7] = latent
    with pytest.raises(IndexError):
        ReconstructionSums.empty(D_IN, D_SAE, "cpu").add_whole(x, recon, codes)
