"""The code store returns codes unchanged, for any order, number and memory limit."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest
import torch

from delta_selectivity.models.language_model import Site
from delta_selectivity.run.code_store import CodeStore
from delta_selectivity.saes import SparseRows

SITE, CPU = Site(0, "resid_post"), torch.device("cpu")
N_ROWS, D_SAE = 60, 70_000
ENTRY = 8  # bytes


def random_codes(n_rows, seed, most=9):
    """Return rows of 0 to `most` latents, some of them twice in a row, and the matrix that they represent."""
    random = np.random.default_rng(seed)
    count = random.integers(0, most + 1, n_rows)
    crow = np.concatenate([[0], np.cumsum(count)])
    col = random.choice([3, 5, 40_000, D_SAE - 1, 17], crow[-1])
    value = random.standard_normal(crow[-1]).astype(np.float32)
    dense = np.zeros((n_rows, D_SAE), np.float32)
    np.add.at(dense, (np.repeat(np.arange(n_rows), count), col), value)
    return SparseRows(*map(torch.from_numpy, (crow, col, value)), D_SAE), dense


def in_columns(codes, chosen=(3, 5, 17, 40_000, D_SAE - 1, 8)):
    """Return the chosen columns of a CSR tensor, [rows, chosen]."""
    return (codes @ torch.nn.functional.one_hot(torch.tensor(chosen), D_SAE).float().T.contiguous()).numpy()


@pytest.mark.parametrize(
    ("max_bytes", "in_file"), [(1 << 30, False), (200 * ENTRY, True), (0, True)], ids=["memory", "on the way", "file"]
)
def test_codes_are_returned_for_any_order(max_bytes, in_file):
    store = CodeStore(N_ROWS, max_bytes)
    order = torch.randperm(N_ROWS, generator=torch.Generator().manual_seed(0))
    whole = {sae_id: random_codes(N_ROWS, seed=sae_id) for sae_id in (0, 1)}
    for ids in order.split(13):
        for sae_id, (codes, _) in whole.items():
            store.put(SITE, sae_id, ids, codes.select(ids))
        some = torch.cat([ids.flip(0), ids[:2]])  # in reverse, two of them again: requested between two batches
        for sae_id, (_, dense) in whole.items():
            np.testing.assert_allclose(
                in_columns(store.get(SITE, sae_id, some, CPU)),
                dense[some][:, [3, 5, 17, 40_000, D_SAE - 1, 8]],
                atol=1e-6,
            )
    assert store.in_file == in_file
    for sae_id, (_, dense) in whole.items():
        codes = store.get(SITE, sae_id, torch.arange(N_ROWS), CPU)
        assert codes.shape == (N_ROWS, D_SAE)
        assert codes.layout == torch.sparse_csr
        np.testing.assert_allclose(in_columns(codes), dense[:, [3, 5, 17, 40_000, D_SAE - 1, 8]], atol=1e-6)
    store.close()


def test_the_spill_file_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = CodeStore(N_ROWS, 0)
    store.put(SITE, 0, torch.arange(N_ROWS), random_codes(N_ROWS, seed=0)[0])
    assert store.in_file
    assert list(tmp_path.iterdir()) == [], "a killed run would leave it behind"
    store.close()


@pytest.mark.parametrize("max_bytes", [-1, 100], ids=["file", "memory"])
def test_rows_in_which_nothing_fires(max_bytes):
    store = CodeStore(2, max_bytes)
    store.put(SITE, 0, torch.arange(2), random_codes(2, seed=0, most=0)[0])
    assert (in_columns(store.get(SITE, 0, torch.arange(2), CPU)) == 0).all()
    store.close()


def test_missing_rows_do_not_count_as_rows_without_latents():
    store = CodeStore(N_ROWS, 100)
    store.put(SITE, 0, torch.arange(5), random_codes(5, seed=0)[0])
    with pytest.raises(AssertionError, match="before they are stored"):
        store.get(SITE, 0, torch.tensor([5]), CPU)
