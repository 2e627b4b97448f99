"""The model's output when it continues from x̂: compared with a plain hook on the whole model, and with SAE Lens."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import people, write_csv, write_identity, write_sparsify
from runs import Request, files
from safetensors.torch import load_file, save_file
from test_schema import faults
from transformers import AutoModelForCausalLM

from delta_selectivity.errors import RequestError
from delta_selectivity.run import downstream
from delta_selectivity.run.downstream import measure_downstream
from delta_selectivity.run.downstream_figures import TextSums, downstream_figures
from delta_selectivity.run.planning import Cell, make_plan
from delta_selectivity.run.request import Request as RunRequest
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.settings import Settings
from delta_selectivity.system.cores import Cores
from delta_selectivity.tasks import UserData

ROWS = [{**row, "text": f"{row['text']}{' of the old town' if i % 3 else ''}"} for i, row in enumerate(people(24))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "women.csv", ROWS)


def planned(model, sae, data, **settings):
    asked = Settings(folds=3, repeats=1, downstream=True, **settings)
    tasks = (UserData(str(data)),)
    return make_plan(RunRequest(str(model), (str(sae),), tasks, (1,), asked, data.parent / "out", "cpu", "cpu"))


def measured(plan, cores=1):
    tokenised = plan.tokenise(plan.texts.mentions)
    sample = TokenSample.draw(tokenised, plan.texts, plan.whole_tokens, plan.request.settings.seed)
    (site,) = plan.subjects[0].sites
    saes = {site: {0: plan.subjects[0].source.load(1, "cpu")}}
    cell = Cell(0, site, 0)
    return tokenised, measure_downstream(plan, [cell], saes, tokenised, sample, Cores(cores))[cell]


def topk_recon(folder, x):
    """Return x̂ of an SAE of `write_sparsify`, in plain torch."""
    weights, k = load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())["k"]
    top = torch.relu(x @ weights["encoder.weight"].T).topk(k, dim=-1)
    return torch.zeros(len(x), len(weights["W_dec"])).scatter_(1, top.indices, top.values) @ weights["W_dec"]


def by_plain_hook(model_folder, module_of, recon_of, tokenised, skip, last_only=True):
    """Compute figures of each text separately, with a forward hook on a whole transformers model: sums over tokens."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    module, seen, put = module_of(model), [], []

    def hook(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        seen.append(x.detach().clone())
        if not put:
            return None
        changed = x.clone()
        changed[0, skip:] = put[0]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    texts = [torch.from_numpy(ids.astype(np.int64))[None] for ids in tokenised.ids]
    with torch.no_grad():
        before = [model(ids).logits[0].double().log_softmax(-1) for ids in texts]
        handle = module.register_forward_hook(hook)
        for ids in texts:
            model(ids)
        x = [of_text[0, skip:] for of_text in seen]
        mean = torch.cat(x).double().mean(0).float()
        found = {"model": before}
        constant = {"mean": mean, "zero": torch.zeros_like(mean)}
        flat = {name: [value.expand(len(one), -1) for one in x] for name, value in constant.items()}
        for name, rows in {"sae": list(map(recon_of, x)), **flat}.items():
            after = []
            for ids, own in zip(texts, rows, strict=True):
                put[:] = [own]
                after.append(model(ids).logits[0].double().log_softmax(-1))
            found[name] = after
        handle.remove()

    def ce(logps, only=None):
        each = [
            -logp[:-1].gather(1, ids[0, 1:, None])[:, 0][skip if only is None else only :]
            for logp, ids in zip(logps, texts, strict=True)
        ]
        return float(torch.cat(each).mean())

    def kl(logps):
        return [(b.exp() * (b - a)).sum(1) for b, a in zip(before, logps, strict=True)]

    named = [slice(last if last_only else first, last + 1) for first, last in
             zip(tokenised.first, tokenised.last, strict=True)]  # fmt: skip
    follow = [(i, at) for i, own in enumerate(named) for at in range(own.start, own.stop)
              if at + 1 < len(tokenised.ids[i])]  # fmt: skip
    at_name = {
        name: np.mean([-float(logps[i][at, texts[i][0, at + 1]]) for i, at in follow]) for name, logps in found.items()
    }
    return {
        "ce_model": ce(before), "ce_sae": ce(found["sae"]), "ce_mean": ce(found["mean"]),
        "ce_zero": ce(found["zero"]), "kl_zero": float(torch.cat([one[skip:] for one in kl(found["zero"])]).mean()),
        "kl_sae": float(torch.cat([one[skip:] for one in kl(found["sae"])]).mean()),
        "kl_mean": float(torch.cat([one[skip:] for one in kl(found["mean"])]).mean()),
        "kl_pos": np.mean([float(one[own].mean()) for one, own in zip(kl(found["sae"]), named, strict=True)]),
        "delta_ce_pos": at_name["sae"] - at_name["model"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "bos", "positions"),
    [("", "counted", "last"), ("", "excluded", "all"), (".mlp", "none", "mean")],
)
def test_figures_are_those_of_a_plain_hook_on_the_whole_model(tiny_model, data, tmp_path, suffix, bos, positions):
    sae = write_sparsify(tmp_path / "sae", [1], k=8, suffix=suffix)
    tokenised, found = measured(planned(tiny_model, sae, data, bos=bos, positions=positions))
    expected = by_plain_hook(
        tiny_model,
        lambda model: model.gpt_neox.layers[1].mlp if suffix else model.gpt_neox.layers[1],
        lambda x: topk_recon(sae / f"layers.1{suffix}", x),
        tokenised, skip=int(bos == "excluded"), last_only=positions == "last",
    )  # fmt: skip
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, abs=1e-5)
    assert found.delta_ce == pytest.approx(expected["ce_sae"] - expected["ce_model"], abs=1e-5)
    above, below = (expected["ce_mean"] - expected[name] for name in ("ce_sae", "ce_model"))
    assert found.ce_recovered is None or found.ce_recovered == pytest.approx(above / below, rel=1e-3)
    assert (found.n_texts_run, found.n_tokens_run) == (
        len({ids.tobytes() for ids in tokenised.ids}), sum(map(len, tokenised.ids)) - (bos == "excluded") * len(ROWS)
    )  # fmt: skip


def test_an_identity_changes_nothing_and_small_passes_give_the_same(tiny_model, data, tmp_path, monkeypatch):
    _, same = measured(planned(tiny_model, write_identity(tmp_path / "identity", [1]), data))
    assert (same.delta_ce, same.kl_sae, same.kl_pos) == (0, 0, 0)
    plan = planned(tiny_model, write_sparsify(tmp_path / "sae", [1]), data)
    _, whole = measured(plan)
    monkeypatch.setattr(downstream, "LOGITS", 1)  # one text per pass
    monkeypatch.setattr(downstream, "CHUNK", 1)
    _, small = measured(plan, cores=2)
    assert vars(small) == pytest.approx(vars(whole), abs=1e-6)


def test_downstream_figures_do_not_depend_on_other_datasets(tiny_model, data, tmp_path):
    sae = write_sparsify(tmp_path / "sae", [1])
    plan = planned(tiny_model, sae, data)
    other = write_csv(tmp_path / "other.csv", [*ROWS[:10], *people(30, seed=5)])
    tasks = (UserData(str(other)), UserData(str(data)))
    both = make_plan(replace(plan.request, tasks=tasks))
    tokenised = both.tokenise(both.texts.mentions)
    sample = TokenSample.draw(tokenised, both.texts, None, 0)
    (site,) = both.subjects[0].sites
    saes = {site: {0: both.subjects[0].source.load(1, "cpu")}}
    cells = [Cell(index, site, 0) for index in (0, 1)]
    found = measure_downstream(both, cells, saes, tokenised, sample, Cores(1))
    assert found[cells[1]] == measured(plan)[1]
    assert found[cells[0]] != found[cells[1]]


def test_downstream_figures_do_not_depend_on_other_layers(tiny_model, data, tmp_path):
    sae = write_sparsify(tmp_path / "sae", [0, 1])
    plan = planned(tiny_model, sae, data)
    both = make_plan(replace(plan.request, layers=(0, 1)))
    tokenised = both.tokenise(both.texts.mentions)
    sample = TokenSample.draw(tokenised, both.texts, None, 0)
    saes = {site: {0: both.subjects[0].source.load(site.layer, "cpu")} for site in both.subjects[0].sites}
    found = measure_downstream(both, [Cell(0, site, 0) for site in saes], saes, tokenised, sample, Cores(1))
    assert len(found) == 2
    assert found[Cell(0, both.subjects[0].sites[1], 0)] == measured(plan)[1]


def test_a_transcoder_is_inserted_at_its_output(tiny_model, data, tmp_path):
    folder = write_sparsify(tmp_path / "sae", [1], suffix=".mlp") / "layers.1.mlp"
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "transcode": True}))
    tokenised, found = measured(planned(tiny_model, tmp_path / "sae", data, bos="counted"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.gpt_neox.layers[1].mlp.register_forward_hook(lambda _m, args, _o: topk_recon(folder, args[0][0])[None])
    ce = []
    with torch.no_grad():
        for row in tokenised.ids:
            ids = torch.from_numpy(row.astype(np.int64))[None]
            ce.append(-model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    assert found.ce_sae == pytest.approx(float(torch.cat(ce).mean()), abs=1e-5)


def test_non_finite_logits_are_one_line_that_names_the_sae(tiny_model, data, tmp_path):
    sae = write_sparsify(tmp_path / "sae", [1])
    weights = load_file(sae / "layers.1" / "sae.safetensors")
    weights["b_dec"][3] = 1e38  # finite, but its norm is not
    save_file(weights, sae / "layers.1" / "sae.safetensors")
    with pytest.raises(
        ArithmeticError, match=r"^layer 1: .* in the model's predictions with the reconstruction by .*sae$"
    ):
        measured(planned(tiny_model, sae, data))


def test_out_of_memory_halves_the_pass(tiny_model, data, tmp_path, monkeypatch, caplog):
    plan = planned(tiny_model, write_sparsify(tmp_path / "sae", [1]), data)
    _, whole = measured(plan)
    run = downstream.DownstreamPass._process

    def tight(self, batch, means):
        if len(batch.mentions) > 5:
            raise torch.OutOfMemoryError
        return run(self, batch, means)

    monkeypatch.setattr(downstream.DownstreamPass, "_process", tight)
    _, small = measured(plan)
    assert vars(small) == pytest.approx(vars(whole), abs=1e-6)
    assert "out of memory" in caplog.text


def test_texts_are_drawn_whole_and_by_the_seed(tiny_model, data, tmp_path):
    sae = write_sparsify(tmp_path / "sae", [1])
    few, again, other = (measured(planned(tiny_model, sae, data, whole_tokens=60, seed=seed))[1] for seed in (0, 0, 3))
    assert 0 < few.n_texts_run < len(ROWS)
    assert few == again
    assert few.kl_sae != other.kl_sae
    _, none = measured(planned(tiny_model, sae, data, whole_tokens=1))
    assert none.n_texts_run == 0
    assert none.kl_sae is none.delta_ce is none.ce_model is None


def test_intervals_are_those_of_resampling_texts():
    random = np.random.default_rng(0)
    n = random.integers(5, 40, 300).astype(float)
    each = random.normal(0.3, 0.2, 300)
    kl = n * np.abs(each + random.normal(0, 0.1, 300))
    ce, noise = n * 3.0, n * random.normal(0.5, 0.3, 300)
    zero = np.zeros(300)
    model = TextSums(n, zero, n, ce, zero, zero, zero, zero)
    sae, mean = model._replace(kl=kl, ce=ce + 0.1 * noise + kl), model._replace(ce=ce + 4 * n + noise)
    found = downstream_figures(model, sae, mean, mean, np.arange(300))
    drawn = [random.integers(0, 300, 300) for _ in range(1000)]
    for name, values in (
        ("kl_sae", [kl[i].sum() / n[i].sum() for i in drawn]),
        ("delta_ce", [(sae.ce - ce)[i].sum() / n[i].sum() for i in drawn]),
        ("ce_recovered", [(mean.ce - sae.ce)[i].sum() / (mean.ce - ce)[i].sum() for i in drawn]),
    ):
        half = (getattr(found, f"{name}_ci_high") - getattr(found, f"{name}_ci_low")) / 2
        assert half == pytest.approx(1.97 * np.std(values), rel=0.1)
    twice = downstream_figures(*(TextSums(*np.repeat(sums, 2, axis=1)) for sums in (model, sae, mean, mean)),
                               np.repeat(np.arange(300), 2))  # fmt: skip
    assert twice.kl_sae_ci_low == pytest.approx(found.kl_sae_ci_low)
    assert twice.n_texts_run == 300
    assert found.kl_pos is None
    assert downstream_figures(model, sae, model._replace(ce=ce - 1), mean, np.arange(300)).ce_recovered is None


def test_a_run_needs_the_lm_head_only_for_downstream_figures(tiny_model, tmp_path, capsys):
    headless = tmp_path / "headless"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(headless)
    weights = load_file(headless / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "embed_out" not in name and "lm_head" not in name},
              headless / "model.safetensors", {"format": "pt"})  # fmt: skip
    for path in tiny_model.glob("tokenizer*"):
        (headless / path.name).write_bytes(path.read_bytes())
    data = write_csv(tmp_path / "women.csv", [{**row, "task": "women"} for row in people(60)])
    sae = write_sparsify(tmp_path / "sae", [1])
    flags = ("--folds", "3", "--repeats", "1", "--baselines", "names,identity")
    plain = Request(headless, (sae,), data, tmp_path / "plain", flags)
    assert plain.run() == 0
    assert plain.into(tmp_path / "no").plus("--downstream").run() == 2
    assert "weights are missing" in capsys.readouterr().err
    full = replace(plain, model=tiny_model).into(tmp_path / "full").plus("--downstream")
    assert full.run() == 0
    for path in files(tmp_path / "full"):
        content = json.loads(path.read_text())
        baseline = content["_run"]["config"].get("baseline")
        assert ("kl_sae" in content["layer_1"]) == (baseline != "names")
        assert faults(content) == []
        assert baseline != "identity" or content["layer_1"]["delta_ce"] == 0
    assert replace(plain, model=tiny_model).into(tmp_path / "full").run() == 2
    assert "downstream" in capsys.readouterr().err


def test_a_place_that_cannot_be_replaced_is_rejected(tiny_model, data, tmp_path):
    sae = write_sparsify(tmp_path / "sae", [1])
    with pytest.raises(RequestError, match="`downstream`: the value at resid_mid"):
        planned(tiny_model, sae, data, hookpoint="resid_mid")


@pytest.mark.slow
def test_figures_are_those_of_sae_lens(tiny_model, data, tmp_path):
    """Compare with the function that `run_evals` calls on a TransformerLens model; it averages over tokens and BOS."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.evals import get_downstream_reconstruction_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    from benchmarks.sae_probes_driver import loader

    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64, device="cpu"))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    with torch.no_grad():
        for weight in sae.parameters():
            weight.normal_(0, 0.2)
    sae.save_model(tmp_path / "sae" / "blocks.1.hook_resid_post")

    some = write_csv(tmp_path / "some.csv", ROWS)
    tokenised, found = measured(planned(tiny_model, tmp_path / "sae", some, bos="counted"))
    model = loader(str(tiny_model))("")
    total = dict.fromkeys(("kl", "kl_zero", "ce", "ce_sae", "ce_zero", "n", "n_next"), 0.0)
    for ids in tokenised.ids:
        store = SimpleNamespace(get_batch_tokens=lambda _n, ids=ids: torch.from_numpy(ids.astype(np.int64))[None])
        theirs = get_downstream_reconstruction_metrics(sae, model, store, ActivationScaler(), True, True, 1, 1)
        n = len(ids)
        total["kl"] += theirs["kl_div_with_sae"] * n
        total["kl_zero"] += theirs["kl_div_with_ablation"] * n
        total["ce_zero"] += theirs["ce_loss_with_ablation"] * (n - 1)
        total["ce"] += theirs["ce_loss_without_sae"] * (n - 1)
        total["ce_sae"] += theirs["ce_loss_with_sae"] * (n - 1)
        total["n"] += n
        total["n_next"] += n - 1
    assert found.kl_sae == pytest.approx(total["kl"] / total["n"], abs=2e-5)
    assert found.kl_zero == pytest.approx(total["kl_zero"] / total["n"], abs=2e-5)
    assert found.ce_zero == pytest.approx(total["ce_zero"] / total["n_next"], abs=2e-5)
    assert found.ce_model == pytest.approx(total["ce"] / total["n_next"], abs=2e-5)
    assert found.ce_sae == pytest.approx(total["ce_sae"] / total["n_next"], abs=2e-5)
