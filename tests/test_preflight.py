"""The preflight: every planted mismatch is found and named, and matching SAEs are never stopped."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import files
from safetensors.torch import load_file, save_file

from delta_selectivity.cli import main as program
from delta_selectivity.cli.command_line import DEMO_MODEL, DEMO_SAES
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.records import result_file
from delta_selectivity.run import preflight
from delta_selectivity.run.calibration import SiteSample, draw_tokens, principal_axes
from delta_selectivity.run.preflight import PLACES, Preflight, alternative_sites
from delta_selectivity.saes import Sae, open_sae, principal_components
from delta_selectivity.saes.input_norm import normalise
from delta_selectivity.tasks import load_probe_texts, tokenise

LAYERS = range(6)


@pytest.fixture(scope="module")
def info():
    return open_model(str(DEMO_MODEL))


@pytest.fixture(scope="module")
def check(info):
    mentions = load_probe_texts(["gender"], shuffle_select_n=200).mentions
    tokenised = tokenise(mentions, info.tokenizer, prepend_bos=True, max_length=info.max_length)
    sites = {Site(layer, "resid_post"): info.d_model for layer in LAYERS}
    model = info.load(alternative_sites(info.n_layers, sites, info.widths, everywhere=True), "cpu", "float32")
    return Preflight.sample(model, info, tokenised, seed=0)


@pytest.fixture(scope="module")
def saes():
    """Return the bundled SAEs: (name, layer) -> Sae."""
    return {(path.name, layer): open_sae(str(path)).load(layer, "cpu") for path in DEMO_SAES for layer in LAYERS}


def components(x: torch.Tensor, site: Site, k: int) -> Sae:
    """Return a code that fits only x: its first k principal components."""
    return along(*principal_axes(x), site, k)


def along(mean: torch.Tensor, axes: torch.Tensor, site: Site, k: int) -> Sae:
    return Sae("pca", site.layer, site.hookpoint, len(mean), k, None, "pca", principal_components(axes[:k], mean))


def test_the_bundled_saes_fit_where_they_say(check, saes):
    fits = [check.examine(sae, Site(layer, "resid_post"), counts_bos=False) for (_, layer), sae in saes.items()]
    assert [fit.problem() for fit in fits] == [None] * 12
    for (name, layer), fit in zip(saes, fits, strict=True):
        assert 0.05 < fit.fvu < 0.35, (name, layer)
        assert fit.l0 == pytest.approx(fit.promised_l0, rel=0.02)


def test_matching_codes_are_not_stopped(check):
    """Codes fitted to every place of every layer, with few and many components: 0 false alarms of 120."""
    alarms = []
    for site, sample in check.samples.items():
        mean, axes = principal_axes(sample.counted(False))
        for k in (2, 16, 64, 200):
            fit = check.examine(along(mean, axes, site, k), site, counts_bos=False)
            alarms += [fit.problem()] if fit.is_misfit else []
    assert len(check.samples) * 4 == len(LAYERS) * len(PLACES) * 4 == 120
    assert alarms == []


@pytest.mark.parametrize(("true_layer", "claimed"), [(a, b) for a in LAYERS for b in LAYERS if abs(a - b) == 1])
def test_an_sae_of_the_layer_before_or_after_is_named(check, saes, true_layer, claimed):
    sae = replace(saes["tiny-pythia-saes-k32", true_layer], layer=claimed)
    fit = check.examine(sae, Site(claimed, "resid_post"), counts_bos=False)
    assert f"better at layer {true_layer}" in fit.problem()
    assert fit.is_misfit == (fit.best.fvu < 0.8 * fit.fvu)


@pytest.mark.parametrize("place", ["mlp_out", "attn_out", "mlp_in"])
def test_an_sae_of_another_place_is_named(check, place):
    x = check.samples[Site(3, place)].counted(False)
    fit = check.examine(components(x, Site(3, "resid_post"), 64), Site(3, "resid_post"), counts_bos=False)
    assert fit.is_misfit
    assert f"far better at {place}" in fit.problem()


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_a_missing_normalisation_is_named(check, norm):
    site = Site(2, "resid_post")
    x = normalise(check.samples[site].counted(False), norm).x
    fit = check.examine(components(x, site, 64), site, counts_bos=False)
    assert fit.is_misfit
    assert f"normalize_activations: {norm}" in fit.problem()


@pytest.mark.parametrize("factor", [1 / 16, 8.0])
def test_scaled_inputs_are_named_with_the_factor(check, saes, factor):
    """The SAE expects scaled inputs: its biases have other units."""
    site, sae = Site(2, "resid_post"), saes["tiny-pythia-saes-k32", 2]
    scaled = replace(sae.coder, b_enc=sae.coder.b_enc * factor, b_dec=sae.coder.b_dec * factor)
    fit = check.examine(replace(sae, coder=scaled), site, counts_bos=False)
    assert fit.is_misfit
    assert f"inputs multiplied by {factor:.4g}" in fit.problem()


@pytest.mark.parametrize("name", ["W_dec", "W_enc"])
def test_a_transposed_square_matrix_is_named(check, name):
    site = Site(4, "resid_post")
    x = check.samples[site].counted(False)
    sae = components(x, site, x.shape[1])
    turned = replace(sae.coder, **{name: getattr(sae.coder, name).T.contiguous()})
    fit = check.examine(replace(sae, coder=turned), site, counts_bos=False)
    assert fit.is_misfit
    assert f"with {name} transposed" in fit.problem()


def test_bos_that_was_excluded_in_training_is_named(check, saes):
    """The bundled SAEs were trained on texts with BOS, but without the activations at BOS (see their cards)."""
    problems = [check.examine(sae, Site(layer, "resid_post"), counts_bos=True) for (_, layer), sae in saes.items()]
    caught = [fit for fit in problems if fit.is_misfit and "`bos` excluded" in fit.problem()]
    assert len(caught) == len(saes)


def test_bos_that_was_used_in_training_is_accepted(check):
    site = Site(3, "resid_post")
    x = check.samples[site].counted(True)
    fit = check.examine(components(x, site, 64), site, counts_bos=True)
    assert not fit.is_misfit


@pytest.mark.parametrize(("has_bos", "fix"), [(True, "`bos` none"), (False, "`bos` excluded")])
def test_texts_with_the_wrong_beginning_are_named(has_bos, fix):
    """If the first token attracts all attention, all later activations differ without it."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 8, 24, generator=generator)
    x, other = (torch.randn(300, 8, generator=generator) @ rows for rows in directions)
    bos = torch.zeros(300, dtype=torch.bool)
    bos[::50] = has_bos
    site, nobody = Site(0, "resid_post"), torch.zeros(300, dtype=torch.bool)
    found = Preflight({site: SiteSample(x, bos, x)}, {site: SiteSample(other, nobody, other)})
    fit = found.examine(components(other, site, 8), site, counts_bos=False)
    assert fit.is_misfit
    assert fix in fit.problem()


@pytest.mark.parametrize("has_bos", [True, False])
def test_both_beginnings_are_compared_on_the_same_tokens(info, has_bos):
    mentions = load_probe_texts(["gender"], shuffle_select_n=30).mentions
    texts = tokenise(mentions, info.tokenizer, prepend_bos=has_bos, max_length=info.max_length)
    longest = max(map(len, texts.ids))
    other = texts.with_other_bos(info.opening_token_id, longest)
    drawn = draw_tokens(texts, seed=0)
    same = preflight._same_tokens(drawn, texts, other)
    index = {(text, len(ids) - place): ids[place] for text, ids in enumerate(texts.ids) for place in range(len(ids))}
    found = [(text, len(other.ids[text]) - place) for text, place in zip(same.text, same.place, strict=True)]
    assert [index[token] for token in found] == [other.ids[t][p] for t, p in zip(same.text, same.place, strict=True)]
    dropped = len(drawn.text) - len(same.text)
    assert dropped == (np.sum(drawn.place == 0) if has_bos else sum(len(ids) == longest for ids in texts.ids)) > 0


def test_few_long_texts_are_read_or_many_short_ones(info):
    mentions = load_probe_texts(["gender"], shuffle_select_n=200).mentions
    texts = tokenise(mentions, info.tokenizer, prepend_bos=True, max_length=150)
    few = [len(texts.ids[i]) for i in preflight._draw(texts, seed=0)]
    assert sum(few[:-1]) < preflight.READ_TOKENS <= sum(few)
    short = replace(texts, ids=tuple(ids[:4] for ids in texts.ids))
    assert len(preflight._draw(short, seed=0)) == preflight.N_TEXTS


def test_alternatives_are_evaluated_together_and_only_as_far_as_needed(check, saes):
    sae, other = saes["tiny-pythia-saes-k8", 2], saes["tiny-pythia-saes-k32", 2]
    uses = [preflight._use_at(sae, Site(layer, "resid_post"), check.samples) for layer in LAYERS]
    uses += [preflight._Use(other, factor * use.read, factor * use.x) for factor in (0.25, 1, 4) for use in uses[1:3]]
    plain = []
    for each, read, x in uses:
        errors = (x - each.decode(each.encode(read), read)).double().square().sum()
        plain.append(float(errors / (x - x.double().mean(dim=0)).square().sum()))
    assert preflight._fvus(uses) == pytest.approx(plain, rel=1e-5)
    most = sorted(plain)[4] * 1.001
    expected = [fvu if fvu <= most else math.inf for fvu in plain]
    assert preflight._fvus(uses, most) == pytest.approx(expected, rel=1e-5)
    assert math.inf in expected


def test_attention_sinks_do_not_decide_which_texts_fit(check):
    """SmolLM2 makes the first token of a text without BOS a sink, 140 times as long as others and almost constant."""
    site = Site(3, "resid_post")
    x = check.samples[site].counted(False)
    axes = principal_axes(x)[1]
    sae = components(x, site, 16)
    sinks = x[:7] + 140 * float(x.norm(dim=1).median()) * axes[0]
    others = {
        site: replace(check.samples[site], x=torch.cat([x, sinks]), bos=torch.zeros(len(x) + 7, dtype=torch.bool))
    }
    here = {site: check.samples[site]}
    for samples, other in ((here, others), (others, here)):
        fit = Preflight(samples, other).examine(sae, site, counts_bos=False)
        assert fit.problem() is None
        assert fit.fvu == pytest.approx(check.fvu(sae, site), rel=1e-4)
    pulled = torch.cat([x, sinks])
    whole = (pulled - sae.decode(sae.encode(pulled), pulled)).square().sum() / (pulled - pulled.mean(0)).square().sum()
    assert whole < 0.5 * check.fvu(sae, site)  # the effect of the sinks


def test_an_sae_that_fits_nothing_is_not_stopped(check, saes):
    sae = saes["tiny-pythia-saes-k8", 0]
    rows = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(0))
    shuffled = replace(sae, coder=replace(sae.coder, W_dec=sae.coder.W_dec[rows]))
    fit = check.examine(shuffled, Site(0, "resid_post"), counts_bos=False)
    assert fit.fvu > 1
    assert fit.problem() is None


@pytest.mark.parametrize(("promised", "told"), [(32, False), (10, True), (90, True), (None, False)])
def test_an_unexpected_l0_is_reported(check, saes, promised, told):
    """As with a BatchTopK SAE whose threshold was lost: every positive latent fires."""
    sae = replace(saes["tiny-pythia-saes-k32", 2], promised_l0=promised)
    fit = check.examine(sae, Site(2, "resid_post"), counts_bos=False)
    assert not fit.is_misfit
    assert (fit.problem() is not None) == told
    assert fit.problem() is None or "mean L0 is 32.0" in fit.problem()


def test_too_few_tokens_give_no_result(saes):
    site = Site(0, "resid_post")
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    few = Preflight({site: SiteSample(x, torch.zeros(40, dtype=torch.bool), x)}, {})
    assert few.examine(saes["tiny-pythia-saes-k8", 0], site, counts_bos=False).problem() is None


# as it is used


@pytest.fixture
def mislabelled(tmp_path):
    """Return the bundled SAE of layer 5 in the folder of layer 4."""
    folder = tmp_path / "sae"
    shutil.copytree(DEMO_SAES[0] / "layers.5", folder / "layers.4")
    return folder


def command(sae, out, *more: str) -> list[str]:
    small = ["--datasets", "gender", "--shuffle_select_n", "100", "--folds", "3", "--repeats", "1"]
    where = ["--output_directory", str(out), "--device1", "cpu", "--device2", "cpu", "--quiet"]
    return ["--sae_name", str(sae), *small, *where, *more]


def test_a_misfit_stops_the_run_in_one_line_and_leaves_nothing(mislabelled, tmp_path, capsys):
    assert program.main(command(mislabelled, tmp_path / "out")) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "fits far better at layer 5" in line
    assert "--force" in line
    assert files(tmp_path / "out") == []


def test_force_measures_a_misfit_and_records_a_warning(mislabelled, tmp_path):
    assert program.main(command(mislabelled, tmp_path / "out", "--force")) == 0
    (path,) = files(tmp_path / "out")
    assert any("fits far better at layer 5" in line for line in result_file.read(path)["_run"]["warnings"])


def test_counting_bos_is_part_of_the_key(tmp_path):
    """--bos counted on SAEs that never saw BOS is stopped; if forced, the key differs from that of other runs."""
    sae = tmp_path / "sae"
    shutil.copytree(DEMO_SAES[0] / "layers.1", sae / "layers.1")
    assert program.main(command(sae, tmp_path / "out", "--bos", "counted")) == 2
    assert program.main(command(sae, tmp_path / "out", "--bos", "counted", "--force")) == 0
    assert program.main(command(sae, tmp_path / "out")) == 2, "made with other settings"
    (path,) = files(tmp_path / "out")
    assert result_file.read(path)["_run"]["key"]["counts_bos"] is True


def test_inspect_describes_an_sae_and_where_it_fits(mislabelled, capsys):
    assert program.main(["inspect", "--sae_name", str(mislabelled), "--datasets", "gender", "--device1", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "sparsify, topk, k 8, 256 -> 1024 latents" in shown
    assert "fits far better at layer 5" in shown
    (table,) = [part for part in shown.split("FVU of ordinary tokens at ") if part.startswith("resid_post")]
    (row,) = [line for line in table.splitlines() if line.startswith("| 4 ")]
    figures = [cell.strip() for cell in row.split("|")[2:-1]]
    assert figures[4].endswith("*")
    assert min(figures, key=lambda figure: float(figure.rstrip("*"))) == figures[5]


def test_missing_normalisation_of_a_file_is_found(tmp_path, capsys):
    """A bundled SAE is rescaled for inputs of norm sqrt(d), and its config does not say so."""
    folder = tmp_path / "sae" / "layers.3"
    shutil.copytree(DEMO_SAES[0] / "layers.3", folder)
    tensors, factor = load_file(folder / "sae.safetensors"), 1 / 8
    tensors["encoder.bias"] *= factor
    tensors["b_dec"] *= factor
    save_file(tensors, folder / "sae.safetensors")
    assert json.loads((folder / "cfg.json").read_text())["d_in"] == 256
    assert program.main(command(folder.parent, tmp_path / "out")) == 2
    assert "inputs multiplied by 0.125" in capsys.readouterr().err
