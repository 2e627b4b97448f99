"""Latents that carry a probe: compared with plain NumPy, and planted latents are found."""

from __future__ import annotations

import gzip
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import people, write_csv, write_sparsify
from runs import Request, files
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from test_html_report import page_of
from test_rows import unpacked

from delta_selectivity.api.results import Results
from delta_selectivity.cli import report
from delta_selectivity.errors import RequestError
from delta_selectivity.probing.latents import carriers
from delta_selectivity.records import latents
from delta_selectivity.run.carriers import find_carriers
from delta_selectivity.run.extraction import extract
from delta_selectivity.run.request import Request as RunRequest
from delta_selectivity.settings import Settings
from delta_selectivity.tasks import UserData

D, N = 12, 400


def world(drop=None, silence=None):
    """Return (w, x, recon, codes, directions, labels) of an SAE of orthonormal features; the third predicts the label.

    drop: a latent that never fires. silence: a latent whose decoder direction is 0.
    """
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.normal(size=(D, D)))[0]
    labels = np.arange(N) % 2 == 0
    features = np.maximum(random.normal(size=(N, D)), 0)
    features[:, 3] = np.where(labels, 2.0, 0.0) * (random.random(N) < 0.8)
    features[:, 5] += np.where(labels, 0.3, 0.0)
    x = features @ directions
    codes, decoder = features.copy(), directions.copy()
    if drop is not None:
        codes[:, drop] = 0
    if silence is not None:
        decoder[silence] = 0
    w = directions[3] + 0.5 * directions[5]
    return w, x, codes @ decoder, codes, decoder, labels


def found_in(w, x, recon, codes, decoder, labels, kept=20):
    parts = map(torch.from_numpy, (w, x, recon))
    fired = torch.arange(D)
    sparse = torch.from_numpy(codes).to_sparse_csr()
    return carriers(*parts, sparse, torch.from_numpy(decoder), fired, labels, np.ones(N), kept)


def test_shares_equal_plain_sums_and_add_up_to_one():
    w, x, recon, codes, decoder, labels = world()
    found = found_in(w, x, recon, codes, decoder, labels)
    gap = w @ (x[labels].mean(axis=0) - x[~labels].mean(axis=0))
    assert found.gap == pytest.approx(gap)
    assert found.latents[:2].tolist() == [3, 5]
    for i, latent in enumerate(found.latents):
        z = codes[:, latent]
        difference = z[labels].mean() - z[~labels].mean()
        assert found.share[i] == pytest.approx((w @ decoder[latent]) * difference / gap)
        assert found.auc[i] == pytest.approx(roc_auc_score(labels, z))
        assert found.rate[:, i] == pytest.approx([(z[~labels] != 0).mean(), (z[labels] != 0).mean()])
    assert found.share.sum() == pytest.approx(1.0)
    assert (found.error, found.rest, found.others) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    few = found_in(w, x, recon, codes, decoder, labels, kept=1)
    assert len(few.latents) < D
    assert few.share.sum() + few.others == pytest.approx(1.0)


def test_a_planted_dropped_latent_is_found():
    whole, without = found_in(*world()), found_in(*world(drop=3))
    assert without.latents[0] == 3
    assert without.share[0] == 0
    assert without.rate[:, 0].tolist() == [0, 0]
    assert without.dropped[0] == pytest.approx(whole.share[0])
    assert without.error == pytest.approx(whole.share[0])
    assert np.abs(without.dropped[1:]).max() < 1e-9


def test_a_latent_without_direction_has_auc_but_no_share():
    found = found_in(*world(silence=3))
    place = found.latents.tolist().index(3)
    assert found.share[place] == found.dropped[place] == 0
    assert found.auc[place] > 0.85
    assert found.error > 0.8


def test_duplicate_entries_are_summed_and_ties_count_half():
    codes = torch.sparse_csr_tensor(
        torch.tensor([0, 2, 3]), torch.tensor([1, 1, 0]), torch.tensor([1.0, 2.0, 0.0]), (2, 2)
    )
    x = torch.tensor([[3.0], [1.0]], dtype=torch.float64)
    w, directions = torch.ones(1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    found = carriers(w, x, x, codes, directions, torch.arange(2), np.array([True, False]), np.ones(2))
    by_latent = dict(zip(found.latents.tolist(), zip(found.difference, found.auc, strict=True), strict=True))
    assert by_latent == {1: (3.0, 1.0), 0: (0.0, 0.5)}


@pytest.fixture(scope="module")
def measured(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    sae = write_sparsify(folder / "sae", layers=[1])
    data = write_csv(folder / "mine.csv", people(120))
    request = Request(tiny_model, (sae,), data, folder / "out")
    assert request.plus("--keep_texts").run() == 0
    return folder, request, sae, data


def test_latents_of_a_finished_run_agree_with_plain_code(measured, tiny_model, capsys, monkeypatch):
    folder, request, sae, data = measured
    monkeypatch.setattr("delta_selectivity.run.carriers.carriers", partial(carriers, kept=96))
    frame = Results.load(request.out).latents("mine", layer=1)
    assert frame["share"].sum() == pytest.approx(1.0)
    task, settings = UserData(str(data)), Settings(folds=3, repeats=1)
    asked = RunRequest(str(tiny_model), (str(sae),), (task,), (1,), settings, folder, "cpu", "cpu")
    rows = extract(asked, folder / "rows.safetensors")
    labels = np.empty(len(rows.x), bool)
    (probe,) = rows.probes
    labels[probe.rows] = probe.labels
    weights = load_file(sae / "layers.1" / "sae.safetensors")
    k = json.loads((sae / "layers.1" / "cfg.json").read_text())["k"]
    x = torch.from_numpy(rows.x)
    pre = torch.relu((x - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"])
    top = pre.topk(k, dim=1)
    z = torch.zeros_like(pre).scatter_(1, top.indices, top.values).numpy()
    own = frame[frame["latent"].notna()].set_index("latent")
    assert len(own) == 96
    for latent, line in own.iterrows():
        column = z[:, latent]
        assert line["difference"] == pytest.approx(column[labels].mean() - column[~labels].mean(), abs=1e-5)
        assert line["rate_1"] == pytest.approx((column[labels] != 0).mean())
        assert line["auc"] == pytest.approx(roc_auc_score(labels, column), abs=1e-6)
        best = [t.text for t in rows.texts if t.text in line["examples"]]
        assert bool(best) == (column.max() > 0)
    directions = weights["W_dec"].double().numpy()[own.index.astype(int)]
    w = np.linalg.lstsq(directions, own["alignment"].to_numpy(), rcond=None)[0]
    np.testing.assert_allclose(directions @ w, own["alignment"], atol=1e-4)
    gap = w @ (rows.x[labels].mean(axis=0) - rows.x[~labels].mean(axis=0))
    np.testing.assert_allclose(own["share"] * gap, own["alignment"] * own["difference"], atol=1e-4 * abs(gap))
    recon = next(iter(rows.recons.values()))
    error = w @ ((rows.x - recon)[labels].mean(axis=0) - (rows.x - recon)[~labels].mean(axis=0))
    assert frame.set_index("carrier")["share"]["error: no latent"] == pytest.approx(error / gap, abs=1e-4)
    assert report.main([str(request.out), "--latents", "mine"]) == 0
    told = capsys.readouterr().out
    assert f"latent {own.index[0]}" in told
    assert "error: no latent" in told
    _, root = page_of(request.out, folder / "report.html")
    kept = unpacked(root)["latents"]["0"]
    assert [line[0] for line in kept["latents"]] == own.index.tolist()[: len(kept["latents"])]


def test_latents_are_stored_with_the_texts_and_recomputed_if_damaged(measured):
    _, request, _, _ = measured
    (path,) = files(request.out)
    key = json.loads(path.read_text())["_run"]["key"]
    found = latents.load(path, key, 1, "mine")
    assert found["latents"]
    assert latents.load(path, {**key, "seed": 9}, 1, "mine") is None
    where = latents.path_of(path, 1)
    whole = gzip.decompress(where.read_bytes()).decode()
    for damaged in ("", "{", "[]", whole.replace('"share"', '"shore"'), whole.replace('"auc": ', '"auc": "x', 1)):
        where.write_bytes(gzip.compress(damaged.encode()))
        assert latents.load(path, key, 1, "mine") is None
    where.write_bytes(b"no gzip")
    assert latents.load(path, key, 1, "mine") is None


def test_latents_of_private_texts_are_not_kept(measured):
    folder, request, _, _ = measured
    private = request.into(folder / "private")
    assert private.run() == 0
    (path,) = files(private.out)
    assert len(Results.load(private.out).latents("mine")) > 3
    assert not latents.path_of(path, 1).exists()


def test_latents_of_a_changed_sae_are_rejected(measured):
    request = measured[1]
    (path,) = files(request.out)
    results = json.loads(path.read_text())
    for name in ("sae", "model", "data"):
        run = {**results["_run"], "key": {**results["_run"]["key"], name: "another hash"}}
        with pytest.raises(RequestError, match=f"{name}: not the one that was measured"):
            find_carriers({**results, "_run": run}, "mine", 1, "mine")
