"""Baselines: each preserves exactly what it should, and runs treat them like SAEs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_MODEL, D_SAE, N_LAYERS, people, write_csv, write_sparsify
from runs import Request, assert_close, files, numbers
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from delta_selectivity import settings
from delta_selectivity.cli import report
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.selectivity import DEFAULT_CS
from delta_selectivity.records import result_file
from delta_selectivity.reporting.results import load, result_files
from delta_selectivity.reporting.study import study_of
from delta_selectivity.run import measure
from delta_selectivity.run.baselines import (
    CALIBRATED,
    KINDS,
    PER_SAE,
    Baseline,
    MeasuredSae,
    SiteBuilder,
    bag_of_names,
    plan_baselines,
)
from delta_selectivity.run.calibration import SiteSample
from delta_selectivity.saes import Sae, open_sae
from delta_selectivity.tasks import UserData, load_all_mentions, load_probe_texts, tokenise

SITE = Site(1, "resid_post")
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def sample():
    """Return correlated activations far from the origin, 100 of them probed, and some BOS rows that must not count."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, D_MODEL, generator=generator) * torch.linspace(3, 0.1, D_MODEL)
    x = x @ torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=generator)).Q + 20
    bos = torch.arange(600) % 100 == 0
    return SiteSample(torch.where(bos[:, None], 1e4, x), bos, x[bos.logical_not()][:100])


@pytest.fixture(scope="module")
def sae(tiny_saes):
    return open_sae(str(tiny_saes)).load(SITE.layer, DEVICE)


def planned(kind, counts_bos=False):
    of = 0 if kind in PER_SAE else None
    return Baseline(kind, of, "sae" if of == 0 else "resid_post", "resid_post", counts_bos, (1,))


def built(kind, sample, sae, seed=0) -> Sae:
    return SiteBuilder(SITE, D_MODEL, DEVICE, {SITE: sample}, seed).build(
        planned(kind), sae if kind in PER_SAE else None
    )


def fvu(x, recon):
    return float((x - recon).square().sum() / (x - x.mean(dim=0)).square().sum())


def test_the_config_knows_the_kinds():
    assert settings.BASELINES == KINDS


def test_identity_returns_x_bit_for_bit(sample):
    identity = built("identity", None, None)
    codes = identity.encode(sample.x)
    assert torch.equal(identity.decode(codes), sample.x)
    assert torch.equal(codes.l0(), (sample.x != 0).sum(dim=1).float())
    assert codes.n_cols == identity.d_sae == D_MODEL


def test_mean_ablation_is_the_mean_of_the_counted_tokens(sample):
    mean = built("mean", sample, None)
    codes = mean.encode(sample.probed)
    assert codes.l0().tolist() == [0] * 100
    expected = sample.counted(False).mean(dim=0).expand(100, -1)
    torch.testing.assert_close(mean.decode(codes), expected)
    x = sample.counted(False)
    assert fvu(x, mean.decode(mean.encode(x))) == pytest.approx(1, abs=1e-5)


def test_mean_ablation_passes_nan_on():
    broken = torch.full((1, D_MODEL), torch.nan)
    mean = built("mean", SiteSample(torch.zeros(2, D_MODEL), torch.zeros(2, dtype=torch.bool), torch.zeros(1, 2)), None)
    assert mean.encode(broken).value.isnan().any()


def test_pca_is_that_of_scikit_learn_fitted_to_the_same_sample(sample, sae):
    pca = built("pca", sample, sae)
    k = round(float(sae.encode(sample.probed).l0().mean()))
    assert pca.k == pca.d_sae == k
    x = sample.counted(False)
    reference = PCA(n_components=k).fit(x.double().numpy())
    expected = reference.inverse_transform(reference.transform(sample.probed.double().numpy()))
    codes = pca.encode(sample.probed)
    np.testing.assert_allclose(pca.decode(codes), expected, rtol=1e-5, atol=1e-5)
    assert codes.l0().tolist() == [k] * 100


def test_pca_with_all_axes_is_the_identity(sample):
    dense = replace(built("identity", None, None), name="an SAE with an L0 of d_in")
    pca = built("pca", sample, dense)
    assert pca.d_sae == D_MODEL
    torch.testing.assert_close(pca.decode(pca.encode(sample.probed)), sample.probed, rtol=1e-5, atol=1e-4)


def test_random_fires_as_often_as_its_sae_along_unit_directions(sample, sae):
    random = built("random", sample, sae)
    l0 = sae.encode(sample.probed).l0().mean()
    assert random.encode(sample.probed).l0().mean() == round(float(l0))
    assert (random.d_sae, random.coder.W_enc.shape) == (sae.d_sae, (D_SAE, D_MODEL))
    torch.testing.assert_close(random.coder.W_enc.norm(dim=1), torch.ones(D_SAE))


def test_the_gain_of_the_random_decoder_is_optimal(sample, sae):
    random, x = built("random", sample, sae), sample.counted(False)
    codes = random.encode(x)
    errors = []
    for factor in (0.98, 1.0, 1.02):
        scaled = replace(random, coder=replace(random.coder, W_dec=random.coder.W_dec * factor))
        errors.append(fvu(x, scaled.decode(codes)))
    assert min(errors) == errors[1] < 1
    cosine = torch.nn.functional.cosine_similarity(random.coder.W_dec, random.coder.W_enc)
    torch.testing.assert_close(cosine, torch.ones(D_SAE), msg="the decoder is the encoder's transpose, scaled")


def test_random_depends_only_on_layer_and_seed(sample, sae):
    def directions(layer, seed):
        builder = SiteBuilder(Site(layer, "resid_post"), D_MODEL, DEVICE, {Site(layer, "resid_post"): sample}, seed)
        return builder.build(planned("random"), sae).coder.W_dec

    assert torch.equal(directions(1, 0), directions(1, 0))
    assert not torch.allclose(directions(1, 0), directions(2, 0))
    assert not torch.allclose(directions(1, 0), directions(1, 1))


def test_the_shuffled_decoder_has_the_same_codes_and_permuted_rows(sample, sae):
    shuffled = built("shuffled", sample, sae)
    codes, own = shuffled.encode(sample.probed), sae.encode(sample.probed)
    assert torch.equal(codes.col, own.col)
    assert torch.equal(codes.value, own.value)
    other = shuffled.coder.permutation
    assert sorted(other.tolist()) == list(range(D_SAE))
    permuted = replace(sae, coder=replace(sae.coder, W_dec=sae.coder.W_dec[other]))
    torch.testing.assert_close(shuffled.decode(codes), permuted.decode(own))
    assert fvu(sample.probed, shuffled.decode(codes)) > 1.5 * fvu(sample.probed, sae.decode(own))


def test_the_shuffled_decoder_leaves_run_time_norms_alone(sample, sae):
    normed = replace(sae, input_norm="layer_norm")
    shuffled = built("shuffled", sample, normed)
    codes = shuffled.encode(sample.probed)
    assert codes.scale is not None
    permuted = replace(normed, coder=replace(sae.coder, W_dec=sae.coder.W_dec[shuffled.coder.permutation]))
    torch.testing.assert_close(shuffled.decode(codes), permuted.decode(codes))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "names"])
def test_every_baseline_accepts_zero_rows(kind, sample, sae):
    baseline = built(kind, sample, sae).to("cpu")
    assert baseline.name == planned(kind).name
    empty = baseline.encode(torch.zeros(0, D_MODEL))
    assert baseline.decode(empty).shape == (0, D_MODEL)
    assert baseline.decode(baseline.encode(sample.probed)).dtype == torch.float32


def test_baselines_without_an_sae_exist_once_per_hook_point():
    saes = [
        MeasuredSae("a", "resid_post", False, (0, 1)),
        MeasuredSae("b", "resid_post", False, (1, 4)),
        MeasuredSae("c", "mlp_out", False, (2,)),
        MeasuredSae("d", "resid_post", True, (3,)),
    ]
    found = plan_baselines(KINDS, saes)
    assert [b.kind for b in found] == sorted((b.kind for b in found), key=KINDS.index)
    identities = {b.slug: b.layers for b in found if b.kind == "identity"}
    assert identities == {
        "resid_post_identity": (0, 1, 4),
        "mlp_out_identity": (2,),
        "resid_post_with_bos_identity": (3,),
    }
    assert [(b.slug, b.sae_id, b.layers) for b in found if b.kind == "pca"] == [
        ("a_pca", 0, (0, 1)),
        ("b_pca", 1, (1, 4)),
        ("c_pca", 2, (2,)),
        ("d_pca", 3, (3,)),
    ]
    assert len({b.slug for b in found}) == len({b.name for b in found}) == len(found)
    assert plan_baselines((), saes) == []


def test_a_key_has_exactly_what_affects_the_numbers():
    for kind in KINDS:
        key = planned(kind).key("hash", "texts")
        assert key["baseline"] == kind
        assert ("calibration" in key) == (kind in CALIBRATED)
        assert ("counts_bos" in key) == (kind != "names")
        json.dumps(key)


def densely(rows):
    dense = np.zeros((rows.n_rows, rows.n_cols))
    for row, (start, stop) in enumerate(pairwise(rows.crow)):
        dense[row, rows.col[start:stop]] = rows.value[start:stop]
    return dense


def test_the_bag_of_tokens_counts_only_the_name(tiny_model):
    info = open_model(str(tiny_model))
    texts = load_all_mentions(("gender",))[:50]
    tokenised = tokenise(texts, info.tokenizer, prepend_bos=True, max_length=info.max_length)
    bag = bag_of_names(tokenised)
    spans = [ids[a : b + 1] for ids, a, b in zip(tokenised.ids, tokenised.first, tokenised.last, strict=True)]
    tokens = np.unique(np.concatenate(spans))
    expected = [[np.count_nonzero(span == token) for token in tokens] for span in spans]
    assert densely(bag).tolist() == expected
    assert max(map(max, expected)) > 1, "a token that a name holds twice counts twice"


# Runs of the program on the tiny model


@pytest.fixture(scope="module")
def request_(tiny_model, tiny_saes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    data = write_csv(folder / "women.csv", people(240))
    return Request(tiny_model, (tiny_saes,), data, folder / "none", ("--folds", "3", "--repeats", "2"))


@pytest.fixture(scope="module")
def whole(request_, tmp_path_factory):
    """Measure every baseline in one run; the tests only read the folder."""
    request = request_.into(tmp_path_factory.mktemp("whole")).plus("--baselines")
    assert request.run() == 0
    return request


def layers_of(folder, kind):
    """Return the records of a baseline by layer: (figures and the result of the one probe)."""
    (path,) = (folder / "baselines").glob(f"*_{kind}/*.json")
    found = result_file.read(path)
    assert found["_run"]["complete"]
    assert found["_run"]["config"]["baseline"] == kind
    layers = [value for name, value in found.items() if name != "_run"]
    assert len(layers) == N_LAYERS
    return [(layer, layer["women"]) for layer in layers]


def bytes_of(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(folder)}


def test_every_baseline_has_its_own_file(whole):
    found = {str(path.relative_to(whole.out)) for path in files(whole.out)}
    name = "pythia-tiny_women.json"
    owners = {kind: "sae-tiny" if kind in PER_SAE else "resid_post" for kind in KINDS}
    assert found == {name, *(f"baselines/{owner}_{kind}/{name}" for kind, owner in owners.items())}


def test_identity_loses_exactly_nothing(whole):
    for figures, cell in layers_of(whole.out, "identity"):
        assert figures["mse_pos"] == figures["mse_whole"] == figures["fvu_whole"] == 0
        assert (cell["delta_sel"], cell["ci_low"], cell["ci_high"], cell["p_value"]) == (0, 0, 0, 1)
        assert cell["transfer_delta"] == 0
        assert figures["l0"] == D_MODEL


def test_mean_ablation_keeps_nothing(whole):
    for figures, cell in layers_of(whole.out, "mean"):
        assert cell["sae_sel"] == 0.5
        assert figures["fvu_whole"] == pytest.approx(1, abs=1e-3), "here every token is in the calibration sample"
        assert (figures["l0"], figures["dead"]) == (0, 1)


def test_random_and_pca_have_the_l0_of_their_sae(whole):
    own = numbers(whole.out)["pythia-tiny_women.json"]
    for kind in ("random", "pca"):
        for layer, (figures, _) in zip(own.values(), layers_of(whole.out, kind), strict=True):
            assert figures["l0"] == round(layer["l0"])
    assert all(figures["fvu_whole"] < 1 for kind in ("random", "pca") for figures, _ in layers_of(whole.out, kind))


def test_the_shuffled_decoder_fires_as_its_sae_and_reconstructs_worse(whole):
    own = numbers(whole.out)["pythia-tiny_women.json"]
    for layer, (figures, _) in zip(own.values(), layers_of(whole.out, "shuffled"), strict=True):
        assert {name: figures[name] for name in ("l0", "l1", "dead")} == {
            name: layer[name] for name in ("l0", "l1", "dead")
        }
        assert figures["fvu_whole"] > layer["fvu_whole"]


def test_a_baseline_with_a_large_fvu_gives_no_warning(whole):
    (path,) = (whole.out / "baselines").glob("*_shuffled/*.json")
    found = result_file.read(path)
    assert found["layer_0"]["fvu_pos"] > 1
    assert not any("FVU" in line for line in found["_run"]["warnings"])


def test_all_baselines_share_the_models_own_probe(whole):
    own = [layer["women"]["model_sel"] for layer in numbers(whole.out)["pythia-tiny_women.json"].values()]
    for kind in KINDS:
        assert [cell["model_sel"] for _, cell in layers_of(whole.out, kind)] == own


def test_the_names_baseline_equals_scikit_learn_on_bags_of_tokens(whole, tiny_model):
    texts = load_probe_texts([UserData(str(whole.data))])
    info = open_model(str(tiny_model))
    tokenised = tokenise(texts.mentions, info.tokenizer, prepend_bos=info.has_bos, max_length=info.max_length)
    dense = densely(bag_of_names(tokenised))
    (probe,) = texts.datasets[0].probes
    expected = selectivity_by_sklearn(dense[probe.mentions], probe.labels, texts.persons[probe.mentions])
    cells = [cell for _, cell in layers_of(whole.out, "names")]
    assert [cell["sae_sel"] for cell in cells] == pytest.approx([expected] * N_LAYERS, abs=1e-9)
    assert expected > 0.9, "the first name gives the label away"
    for cell in cells:
        assert cell["delta_sel"] == pytest.approx(cell["sae_sel"] - cell["model_sel"])
        assert cell["ci_low"] <= cell["delta_sel"] <= cell["ci_high"]
        assert cell["transfer_sel"] is None


def selectivity_by_sklearn(x, labels, persons):
    """Return the selectivity of probes on x, with C for each fold by the class-balanced loss on the other folds."""
    plan = FoldPlan.build(labels[None], persons, None, n_folds=3, n_repeats=2, seed=0)
    found = []
    for folds in plan.folds:
        scores = np.empty((len(DEFAULT_CS), len(x)))
        for i, c in enumerate(DEFAULT_CS):
            for fold in range(3):
                train, test = folds != fold, folds == fold
                fit = LogisticRegression(C=c, class_weight="balanced", tol=1e-10, max_iter=10_000)
                scores[i, test] = fit.fit(x[train], labels[train]).decision_function(x[test])
        loss = np.logaddexp(0, np.where(labels, -scores, scores))
        correct = np.empty(len(x), dtype=bool)
        for fold in range(3):
            other, test = folds != fold, folds == fold
            by_class = [loss[:, other & (labels == label)].mean(axis=1) for label in (False, True)]
            best = int(np.argmin(by_class[0] + by_class[1]))
            correct[test] = (scores[best, test] > 0) == labels[test]
        found.append((correct[labels].mean() + correct[~labels].mean()) / 2)
    return np.mean(found)


def test_the_names_baseline_has_no_reconstruction_figures(whole):
    for figures, _ in layers_of(whole.out, "names"):
        assert all(figures[name] is None for name in ("mse_pos", "mse_whole", "fvu_pos", "l0", "l1", "dead", "cosine"))


def test_the_summary_lists_baselines_below_their_sae(whole, capsys):
    assert report.main([str(whole.out), "--summary"]) == 0
    summary, _meaning, compared = capsys.readouterr().out.strip().split("\n\n")
    assert [line.split("|")[1].strip() for line in summary.splitlines()[2:]] == [
        "sae-tiny",
        *(f"baseline: {kind} of resid_post" for kind in ("identity", "mean", "names")),
        *(f"baseline: {kind} of sae-tiny" for kind in ("pca", "random", "shuffled")),
    ]
    names = summary.splitlines()[5].split("|")
    assert [cell.strip() for cell in names[-3:-1]] == ["-", "-"], "no FVU and no L0"
    pairs = [[cell.strip() for cell in line.split("|")[1:3]] for line in compared.splitlines()[2:]]
    assert pairs == [[f"baseline: {kind} of sae-tiny", "sae-tiny"] for kind in ("pca", "random", "shuffled")]


def test_full_tables_are_those_of_saes_unless_there_are_none(whole, capsys):
    assert report.main([str(whole.out)]) == 0
    in_full = capsys.readouterr().out
    assert "baselines/" not in in_full
    assert report.main([str(whole.out / "baselines")]) == 0
    assert "baselines/resid_post_names/pythia-tiny_women.json" in capsys.readouterr().out


def test_a_finished_run_is_not_repeated(whole, monkeypatch):
    before = bytes_of(whole.out)
    monkeypatch.setattr(measure, "load_weights", lambda *_: pytest.fail("the model was loaded"))
    assert whole.run() == 0
    assert bytes_of(whole.out) == before


def test_adding_baselines_does_not_change_earlier_files(request_, whole, tmp_path, monkeypatch):
    request = request_.into(tmp_path)
    assert request.run() == 0
    before = bytes_of(tmp_path)
    loaded, load = [], measure.load_weights
    monkeypatch.setattr(measure, "load_weights", lambda *asked: loaded.append(load(*asked)) or loaded[-1])
    for kinds, expected in (("random", {1}), ("random,names", set()), ("all", {1, 3, 4, 5})):
        assert request.plus("--baselines", kinds).run() == 0
        saes = loaded[-1].saes
        assert [set(of_site) for of_site in saes.values()] == [expected] * N_LAYERS
    assert {path: content for path, content in bytes_of(tmp_path).items() if path in before} == before
    assert numbers(tmp_path) == numbers(whole.out)


def test_added_layers_equal_those_of_one_run(request_, whole, tmp_path):
    request = request_.into(tmp_path).plus("--baselines")
    assert request.plus("--layers", "1").run() == 0
    assert request.run() == 0
    assert numbers(tmp_path) == numbers(whole.out)


def test_batch_size_changes_no_number(request_, whole, tmp_path):
    assert request_.into(tmp_path).plus("--baselines", "--batch_size", "7").run() == 0
    assert_close(numbers(tmp_path), numbers(whole.out), relative=1e-4, absolute=1e-4)


def test_each_sae_has_its_own_dependent_baselines(request_, whole, tmp_path):
    other = write_sparsify(tmp_path / "sae-sparser", k=2)
    request = replace(request_, saes=(*request_.saes, other)).into(tmp_path / "out").plus("--baselines")
    assert request.run() == 0
    found = numbers(tmp_path / "out")
    alone = numbers(whole.out)
    for path, layers in alone.items():
        assert found[path if path.startswith("baselines") else f"sae-tiny/{path}"] == layers
    extra = {path.split("/")[1] for path in found.keys() - alone.keys() if path.startswith("baselines")}
    assert extra == {"sae-sparser_random", "sae-sparser_pca", "sae-sparser_shuffled"}
    assert found["baselines/sae-sparser_pca/pythia-tiny_women.json"]["layer_0"]["l0"] == 2


def test_datasets_can_be_added(request_, tmp_path):
    request = replace(request_, data=Path()).into(tmp_path)
    few = request.plus("--shuffle_select_n", "60", "--layers", "1", "--baselines", "mean,pca")
    assert few.plus("--datasets", "gender").run() == 0
    before = numbers(tmp_path)
    assert few.plus("--datasets", "gender,is_alive").run() == 0
    after = numbers(tmp_path)
    assert len(after) == 2 * len(before)
    for path, layers in before.items():
        assert after[path]["layer_1"]["mse_whole"] == layers["layer_1"]["mse_whole"]


@pytest.mark.parametrize("positions", ["mean", "all"])
def test_baselines_at_other_positions(request_, tmp_path, positions):
    assert request_.into(tmp_path).plus("--positions", positions, "--baselines", "--layers", "1").run() == 0
    assert only_cell(tmp_path, "identity")["delta_sel"] == 0
    assert only_cell(tmp_path, "mean")["sae_sel"] == pytest.approx(0.5)
    assert only_cell(tmp_path, "names")["sae_sel"] > 0.9


def test_baselines_of_saes_of_one_name_are_kept_apart(request_, tmp_path):
    """The SAEs are measured on two days, so neither run knows of the other's name."""
    first, second = write_sparsify(tmp_path / "a" / "sae"), write_sparsify(tmp_path / "b" / "sae", k=2)
    request = request_.into(tmp_path / "out").plus("--baselines", "pca", "--layers", "0")
    assert replace(request, saes=(first,)).run() == 0
    before = {path: path.read_bytes() for path in files(tmp_path / "out")}
    assert replace(request, saes=(second,)).run() == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    study = study_of(load(result_files(tmp_path / "out")))
    assert [sae.name for sae in study.saes] == [str(first), str(second)]
    assert [[b.belongs_to(sae) for sae in study.saes] for b in study.baselines] == [[True, False], [False, True]]
    assert len({sae.label for sae in study.saes_and_baselines}) == 4
    assert replace(request, saes=(first,)).run() == 0, "and each goes on where it is"
    assert len(files(tmp_path / "out")) == 4
    path = first / "layers.0" / "cfg.json"
    path.write_text(path.read_text().replace('"k": 8', '"k": 4'))
    assert replace(request, saes=(first,)).run() == 2, "what changed since is no other SAE"


def test_an_unknown_baseline_is_refused(request_, capsys):
    assert request_.plus("--baselines", "identity,zero").run() == 2
    assert "'zero' is not one of identity" in capsys.readouterr().err


def test_further_views_of_baselines(request_, tmp_path):
    asked = ("--layers", "1", "--views", "error,latents", "--baselines")
    assert request_.into(tmp_path).plus(*asked).run() == 0
    cells = {kind: only_cell(tmp_path, kind) for kind in KINDS}
    own = numbers(tmp_path)["pythia-tiny_women.json"]["layer_1"]["women"]
    assert cells["identity"]["error_sel"] == 0.5, "there is nothing to see"
    assert cells["shuffled"]["latent_sel"] == own["latent_sel"], "what a view of the latents cannot tell apart"
    assert {kind for kind in KINDS if "latent_sel" in cells[kind]} == {"random", "shuffled"}, "the others have none"
    assert "error_sel" not in cells["names"]


def only_cell(folder, kind):
    (path,) = (folder / "baselines").glob(f"*_{kind}/*.json")
    return result_file.read(path)["layer_1"]["women"]
