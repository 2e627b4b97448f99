"""The producer: every row comes from the right token, and every token counts once, for any batching."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import D_SAE, N_LAYERS, people
from transformers import AutoModelForCausalLM, AutoTokenizer

import delta_selectivity as ds
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.run import activations
from delta_selectivity.run.activations import BlockDone, LayerRows, Producer, plan_blocks
from delta_selectivity.run.row_store import RowStore
from delta_selectivity.run.rows import RowTable
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.saes import Sae, open_sae
from delta_selectivity.system.cores import Cores
from delta_selectivity.system.stopwatch import Stopwatch
from delta_selectivity.tasks import Dataset, Mention, Probe, ProbeTexts, tokenise

SITES = [Site(layer, "resid_post") for layer in range(N_LAYERS)]


@pytest.fixture(scope="module")
def mentions():
    rows = people(40) + [{"text": f"{row['text']}, who then left.", "group": row["group"]} for row in people(9, seed=5)]
    texts = list(dict.fromkeys((row["text"], row["group"]) for row in rows))
    return [Mention(text, text.index(name), text.index(name) + len(name), name) for text, name in texts]


@pytest.fixture(scope="module")
def info(tiny_model):
    return open_model(str(tiny_model))


@pytest.fixture(scope="module")
def model(info):
    return info.load(SITES, "cpu", "float32")


@pytest.fixture(scope="module")
def saes(tiny_saes):
    source = open_sae(str(tiny_saes))
    return {site: {0: source.load(site.layer, "cpu")} for site in SITES}


def everything(mentions):
    """Return one dataset that uses every mention."""
    probe = Probe("p", np.arange(len(mentions)), np.arange(len(mentions)) % 2 == 0)
    return ProbeTexts(tuple(mentions), np.arange(len(mentions)), (Dataset("p", "p", (probe,)),))


def produce(
    model,
    saes,
    info,
    mentions,
    positions="last",
    bos=True,
    counts_bos=False,
    batch_size=None,
    max_tokens=256,
    n_cores=1,
    latents_of=(),
    keep=lambda item: None,
    whole_tokens=None,
):
    """Return all rows by site and view [rows, d], and the figures by site; `keep` is called with every batch."""
    tokenised = tokenise(mentions, info.tokenizer, prepend_bos=bos, max_length=info.max_length)
    rows = RowTable.build(tokenised, positions)
    producer = Producer(
        model, saes, {0: counts_bos}, tokenised, rows, batch_size, Cores(n_cores), Stopwatch(),
        TokenSample.draw(tokenised, everything(mentions), whole_tokens, seed=0), {}, latents_of, max_tokens,
    )  # fmt: skip
    items, texts = [], []
    producer.run(plan_blocks(everything(mentions)), items.append, texts.append)
    assert sum(texts) == len(mentions)
    found = {(site, view): torch.full((len(rows), 32), torch.nan) for site in SITES for view in ("x", "recon")}
    for item in items:
        if isinstance(item, LayerRows):
            keep(item)
            found[item.site, "x"][item.row_ids] = item.x
            found[item.site, "recon"][item.row_ids] = item.recons[0]
    (done,) = (item for item in items if isinstance(item, BlockDone))
    return found, {site: _figures(sums) for (site, _), sums in done.sums.items()}, tokenised, rows


def _figures(sums):
    (limit,) = sums.whole
    return sums.figures(limit)


def one_by_one(model, saes, tokenised, site):
    """Compute activations and reconstructions of every token directly, text by text."""
    result = []
    for ids in tokenised.ids:
        x = model.activations(torch.from_numpy(ids).long()[None])[site][0]
        sae = saes[site][0]
        result.append((x, sae.decode(sae.encode(x))))
    return result


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("counts_bos", [True, False])
@pytest.mark.parametrize("positions", ["last", "mean", "all"])
def test_rows_and_figures_equal_a_plain_loop(model, saes, info, mentions, positions, bos, counts_bos):
    found, figures, tokenised, _rows = produce(model, saes, info, mentions, positions, bos, counts_bos)
    for site in SITES:
        plain = one_by_one(model, saes, tokenised, site)
        spans = [range(a, b + 1) for a, b in zip(tokenised.first, tokenised.last, strict=True)]
        if positions == "last":
            spans = [span[-1:] for span in spans]
        for view, which in (("x", 0), ("recon", 1)):
            tokens = [[pair[which][t] for t in span] for pair, span in zip(plain, spans, strict=True)]
            if positions == "mean":
                tokens = [[torch.stack(name).mean(dim=0)] for name in tokens]
            expected = torch.stack([row for name in tokens for row in name])
            torch.testing.assert_close(found[site, view], expected, atol=1e-5, rtol=0)
        start = 1 if bos and not counts_bos else 0
        x = torch.cat([pair[0][start:] for pair in plain]).double()
        recon = torch.cat([pair[1][start:] for pair in plain]).double()
        assert figures[site].n_tokens == len(x)
        assert figures[site].mse_whole == pytest.approx(float(((x - recon) ** 2).mean()), rel=1e-5)
        fvu = float(((x - recon) ** 2).sum() / ((x - x.mean(dim=0)) ** 2).sum())
        assert figures[site].fvu_whole == pytest.approx(fvu, rel=1e-5)


@pytest.mark.parametrize(
    "limits",
    [
        {"batch_size": 1},
        {"batch_size": 7, "max_tokens": None},
        {"max_tokens": 40},
        {"max_tokens": 10_000},
        {"n_cores": 4},
    ],
)
def test_batching_changes_nothing(model, saes, info, mentions, limits):
    expected, figures, *_ = produce(model, saes, info, mentions)
    found, again, *_ = produce(model, saes, info, mentions, **limits)
    for key, rows in expected.items():
        torch.testing.assert_close(found[key], rows, atol=1e-5, rtol=0)
    for site in SITES:
        assert again[site].mse_whole == pytest.approx(figures[site].mse_whole, rel=1e-6)
        assert again[site].fvu_pos == pytest.approx(figures[site].fvu_pos, rel=1e-6)
        assert again[site].l0 == figures[site].l0


@pytest.mark.parametrize("counts_bos", [True, False])
@pytest.mark.parametrize("most", [1, 60, 10_000])
def test_a_batch_that_takes_several_forward_passes_changes_nothing(
    model, saes, info, mentions, most, counts_bos, monkeypatch
):
    expected, figures, *_ = produce(model, saes, info, mentions, counts_bos=counts_bos)
    shapes = []
    counting = model.module.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(activations, "CPU_TOKENS", most)
    found, again, tokenised, _ = produce(model, saes, info, mentions, counts_bos=counts_bos, max_tokens=10_000)
    counting.remove()
    assert sum(n for n, _ in shapes) == len(tokenised.ids)
    assert all(n == 1 or n * width <= most for n, width in shapes)
    assert (len(shapes) == 1) == (most == 10_000)
    for key, rows in expected.items():
        torch.testing.assert_close(found[key], rows, atol=1e-5, rtol=0)
    for site in SITES:
        assert again[site].mse_whole == pytest.approx(figures[site].mse_whole, rel=1e-6)
        assert again[site].n_tokens == figures[site].n_tokens


def plain_codes(saes, plain, tokenised, site, positions):
    """Compute codes of the probed rows as a matrix [rows, d_sae] in NumPy, name by name."""
    rows = []
    for (x, _), first, last in zip(plain, tokenised.first, tokenised.last, strict=True):
        dense = []
        for token in range(last if positions == "last" else first, last + 1):
            codes = saes[site][0].encode(x[token : token + 1])
            row = np.zeros(codes.n_cols)
            np.add.at(row, codes.col.numpy(), codes.value.numpy())
            dense.append(row)
        rows += [np.mean(dense, axis=0)] if positions == "mean" else dense
    return np.stack(rows)


@pytest.mark.parametrize("max_bytes", [1, 1 << 30], ids=["spilled", "in memory"])
@pytest.mark.parametrize("counts_bos", [True, False])
@pytest.mark.parametrize("positions", ["last", "mean", "all"])
def test_latents_are_unchanged(model, saes, info, mentions, positions, counts_bos, max_bytes, monkeypatch):
    encode = Sae.encode

    def normalising(self, x):  # the decoder undoes it, so it is not part of the code
        return replace(encode(self, x), scale=torch.full((len(x),), 2.0), shift=torch.ones(len(x)))

    monkeypatch.setattr(Sae, "encode", normalising)
    batches = []
    found, _, tokenised, rows = produce(
        model, saes, info, mentions, positions, counts_bos=counts_bos, batch_size=7, latents_of=[0], keep=batches.append
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[: len(rows) // 2]
    here = torch.device("cpu")
    widths = {(site, view): 32 for site in SITES for view in (None, 0)}
    with RowStore(widths, len(rows), here, max_bytes) as store:
        for batch in reversed(batches):
            store.put(batch)
        for site in SITES:
            expected = plain_codes(saes, one_by_one(model, saes, tokenised, site), tokenised, site, positions)
            codes = store.get_latents(site, 0, order, here)
            assert (codes.layout, codes.dtype) == (torch.sparse_csr, torch.float32)
            np.testing.assert_allclose((codes @ torch.eye(D_SAE)).numpy(), expected[order], atol=1e-5)
            assert torch.equal(store.get(site, 0, order, here), found[site, "recon"][order])


def test_latents_are_passed_on_and_counted_only_on_request(model, saes, info, mentions):
    with_them, without = [], []
    produce(model, saes, info, mentions, latents_of=[0], keep=with_them.append)
    produce(model, saes, info, mentions, latents_of=[1], keep=without.append)
    assert all(batch.latents == {} for batch in without)
    for batch, bare in zip(with_them, without, strict=True):
        assert batch.nbytes == bare.nbytes + batch.latents[0].nbytes


def test_row_weights_sum_to_one_per_mention(info, mentions):
    tokenised = tokenise(mentions, info.tokenizer, prepend_bos=True, max_length=128)
    rows = RowTable.build(tokenised, "all")
    totals = np.bincount(rows.mention, weights=rows.weight)
    np.testing.assert_allclose(totals, 1, rtol=1e-6)
    assert len(rows) > len(mentions)


def test_out_of_memory_halves_the_batch_and_changes_no_number(model, saes, info, mentions, monkeypatch, caplog):
    expected, figures, *_ = produce(model, saes, info, mentions)
    forward = type(model).activations

    def at_most_five(self, ids, tokens):
        if len(ids) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids, tokens)

    monkeypatch.setattr(type(model), "activations", at_most_five)
    found, again, *_ = produce(model, saes, info, mentions)
    for key, rows in expected.items():
        torch.testing.assert_close(found[key], rows, atol=1e-5, rtol=0)
    assert again[SITES[0]].n_tokens == figures[SITES[0]].n_tokens
    assert "out of memory" in caplog.text


def test_a_single_text_that_does_not_fit_is_an_error(model, saes, info, mentions, monkeypatch):
    def never(self, ids, tokens):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model), "activations", never)
    with pytest.raises(torch.OutOfMemoryError):
        produce(model, saes, info, mentions)


def test_blocks_cover_every_probed_mention_once_and_the_first_dataset_comes_first():
    a, b, c = np.array([0, 1, 2, 3]), np.array([2, 3, 4]), np.array([5])
    datasets = tuple(
        Dataset(name, name, (Probe(name, mentions, np.zeros(len(mentions), bool)),))
        for name, mentions in (("a", a), ("b", b), ("c", c))
    )
    texts = ProbeTexts(tuple(Mention(str(i), 0, 1, str(i)) for i in range(7)), np.arange(7), datasets)
    blocks = plan_blocks(texts)
    assert [sorted(block.datasets) for block in blocks] == [[0], [0, 1], [1], [2]]
    assert sorted(np.concatenate([block.mentions for block in blocks])) == [0, 1, 2, 3, 4, 5]


def test_a_batch_on_a_cpu_is_limited_by_its_own_size(model, saes):
    assert activations.tokens_in_memory(model.device, saes) == activations.CPU_BATCH
    wide = {Site(layer, "resid_post"): {0: SimpleNamespace(d_in=4096, d_out=4096, d_sae=8)} for layer in range(32)}
    assert activations.tokens_in_memory(model.device, wide) == activations.CPU_TOKENS
    narrower = {site: {0: SimpleNamespace(d_in=1024, d_out=1024, d_sae=8)} for site in list(wide)[:24]}
    tokens = activations.tokens_in_memory(model.device, narrower)
    assert activations.CPU_TOKENS < tokens < activations.CPU_BATCH
    assert tokens * 24 * 1024 * 4 <= activations.CPU_BATCH_BYTES


def test_sink_tokens_are_excluded_from_fvu_ordinary_and_counted(tiny_model, tiny_saes, people_csv, tmp_path, caplog):
    """One token has an embedding 100 times as long, so fvu_whole is its own. A plain loop over the texts agrees."""
    folder = shutil.copytree(tiny_model, tmp_path / "pythia-sinks")
    sinking = AutoModelForCausalLM.from_pretrained(folder)
    texts = [row["text"] for row in csv.DictReader(people_csv.open(encoding="utf-8"))]
    texts = list(dict.fromkeys(texts))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    counts = Counter(token for of_text in ids for token in set(of_text))
    sink = next(token for token, n in counts.items() if len(texts) // 12 < n < len(texts) // 6)
    with torch.no_grad():
        sinking.get_input_embeddings().weight[sink] *= 300
    sinking.save_pretrained(folder)
    asked = {"settings": ds.Settings(folds=3, repeats=1, whole_tokens=None), "device": "cpu", "layers": [1]}
    found = ds.evaluate(folder, str(tiny_saes), str(people_csv), **asked).to_frame().iloc[0]

    sae = open_sae(str(tiny_saes)).load(1, "cpu")
    rows = []
    for of_text in ids:
        with_bos = torch.tensor([[tokenizer.bos_token_id, *of_text]])
        with torch.no_grad():
            rows.append(sinking.gpt_neox(with_bos, output_hidden_states=True).hidden_states[2][0, 1:])
    x = torch.cat(rows)
    recon = sae.decode(sae.encode(x), x).double()
    x = x.double()
    ordinary = x.norm(dim=1) < 10 * x.norm(dim=1).median()

    def fvu(chosen):
        return float((x - recon)[chosen].square().sum() / (x[chosen] - x[chosen].mean(dim=0)).square().sum())

    assert 0 < 1 - ordinary.double().mean() < 0.2
    assert found["outliers"] == pytest.approx(float(1 - ordinary.double().mean()), rel=1e-6)
    assert found["fvu_ordinary"] == pytest.approx(fvu(ordinary), rel=1e-4)
    assert found["fvu_whole"] == pytest.approx(fvu(torch.ones_like(ordinary)), rel=1e-4)
    assert "% of the tokens, whose norm is above 10 times the median" in caplog.text
