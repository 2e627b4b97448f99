"""The calibration sample: the right tokens of the right texts, independent of the rest of the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import D_MODEL, N_LAYERS, people
from sklearn.decomposition import PCA

from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.run import calibration
from delta_selectivity.run.calibration import (
    SiteSample,
    calibrate,
    draw_mentions,
    draw_tokens,
    fingerprint,
    principal_axes,
)
from delta_selectivity.tasks import Mention, UserData, load_all_mentions, load_probe_texts, tokenise

SITES = [Site(layer, "resid_post") for layer in range(N_LAYERS)]


@pytest.fixture(scope="module")
def mentions():
    rows = people(60) + [{"text": f"{row['text']}, who then left.", "group": row["group"]} for row in people(9, seed=5)]
    texts = dict.fromkeys((row["text"], row["group"]) for row in rows)
    return [Mention(text, text.index(name), text.index(name) + len(name), name) for text, name in texts]


@pytest.fixture(scope="module")
def info(tiny_model):
    return open_model(str(tiny_model))


@pytest.fixture(scope="module")
def model(info):
    return info.load(SITES, "cpu", "float32")


@pytest.fixture(scope="module")
def tokenised(mentions, info):
    return tokenise(mentions, info.tokenizer, prepend_bos=True, max_length=info.max_length)


def every_token(model, tokenised, site):
    """Return all activations of each text, run separately: a list of [tokens, d]."""
    return [model.activations(torch.from_numpy(ids).long()[None])[site][0] for ids in tokenised.ids]


def test_few_texts_are_sampled_completely(model, tokenised):
    for site, sample in calibrate(model, tokenised, "last", draw_tokens(tokenised, 0)).items():
        texts = every_token(model, tokenised, site)
        torch.testing.assert_close(sample.counted(True), torch.cat(texts), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sample.counted(False), torch.cat([text[1:] for text in texts]), rtol=1e-4, atol=1e-5)
        assert int(sample.bos.sum()) == len(texts)


@pytest.mark.parametrize("positions", ["last", "mean", "all"])
def test_probed_tokens_are_those_of_the_names(model, tokenised, positions):
    sample = calibrate(model, tokenised, positions, draw_tokens(tokenised, 0))[SITES[1]]
    texts = every_token(model, tokenised, SITES[1])
    first = tokenised.last if positions == "last" else tokenised.first
    expected = [text[a : b + 1] for text, a, b in zip(texts, first, tokenised.last, strict=True)]
    torch.testing.assert_close(sample.probed, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_tokens_are_drawn_by_seed_without_repetition(model, tokenised):
    samples = [calibrate(model, tokenised, "last", draw_tokens(tokenised, seed, 50))[SITES[0]] for seed in (0, 0, 1)]
    drawn = draw_tokens(tokenised, 0, 50)
    assert len(set(zip(drawn.text.tolist(), drawn.place.tolist(), strict=True))) == len(samples[0].x) == 50
    texts = every_token(model, tokenised, SITES[0])
    expected = torch.stack([texts[t][p] for t, p in zip(drawn.text, drawn.place, strict=True)])
    torch.testing.assert_close(samples[0].x, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(samples[0].x, samples[1].x)
    assert not torch.equal(samples[0].x, samples[2].x)


def test_tokens_are_drawn_uniformly(tokenised):
    n_tokens = sum(map(len, tokenised.ids))
    hits = sum(np.sum(draw_tokens(tokenised, seed, 200).place == 0) for seed in range(50))
    expected = 50 * 200 * len(tokenised.ids) / n_tokens
    assert abs(hits - expected) < 4 * np.sqrt(expected), "tokens of short texts are no likelier than others"


def test_a_site_does_not_depend_on_other_requested_sites(info, model, tokenised):
    together = calibrate(model, tokenised, "last", draw_tokens(tokenised, 0))[SITES[0]]
    alone = calibrate(info.load(SITES[:1], "cpu", "float32"), tokenised, "last", draw_tokens(tokenised, 0))
    assert list(alone) == SITES[:1]
    assert torch.equal(alone[SITES[0]].x, together.x)
    assert torch.equal(alone[SITES[0]].probed, together.probed)


def test_texts_are_drawn_once_each_by_seed(mentions, monkeypatch):
    assert draw_mentions(mentions, 0) == mentions, "all, in their order, where there are few"
    monkeypatch.setattr(calibration, "N_TEXTS", 20)
    drawn = draw_mentions(mentions, 0)
    assert len({mention.identity for mention in drawn}) == 20
    assert drawn == draw_mentions(mentions, 0) != draw_mentions(mentions, 1)
    assert fingerprint(drawn) == fingerprint(list(drawn)) != fingerprint(draw_mentions(mentions, 1))


def test_calibration_texts_do_not_depend_on_requested_datasets(people_csv):
    everything = load_all_mentions(("gender",))
    assert everything == load_all_mentions(("is_alive", "politics", UserData(str(people_csv))))
    asked = {mention.identity for mention in load_probe_texts(("gender", "is_alive")).mentions}
    found = [mention.identity for mention in everything]
    assert asked < set(found)
    assert len(found) == len(set(found))
    user_data = UserData(str(people_csv))
    own = load_all_mentions([user_data])
    assert {m.identity for m in own} == {m.identity for m in load_probe_texts([user_data]).mentions}


def test_nan_is_reported_with_its_layer(info, tokenised):
    broken = info.load(SITES, "cpu", "float32")
    broken.module.layers[1].mlp.dense_h_to_4h.bias.data[0] = torch.nan
    with pytest.raises(ArithmeticError, match="layer 1"):
        calibrate(broken, tokenised, "last", draw_tokens(tokenised, 0))


def test_principal_axes_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, D_MODEL, generator=generator) * torch.linspace(3, 0.1, D_MODEL) + 100
    mean, axes = principal_axes(x)
    reference = PCA().fit(x.double().numpy())
    np.testing.assert_allclose(mean, reference.mean_, rtol=1e-12)
    np.testing.assert_allclose((axes.numpy() * reference.components_).sum(axis=1).__abs__(), 1, rtol=1e-9)
    torch.testing.assert_close(axes @ axes.T, torch.eye(D_MODEL, dtype=torch.float64))


def test_bos_is_excluded_from_counted_tokens():
    sample = SiteSample(torch.arange(6.0).view(3, 2), torch.tensor([True, False, False]), torch.zeros(1, 2))
    assert sample.counted(False).tolist() == [[2, 3], [4, 5]]
    assert len(sample.counted(True)) == 3
