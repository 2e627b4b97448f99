"""`scripts/train_saes.py`: harvest and training, killed and resumed; saved SAEs compared with plain arithmetic."""

from __future__ import annotations

import json
import lzma
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import open_model
from delta_selectivity.saes import load_sae, open_sae
from scripts import train_saes
from scripts.sae_training import harvest as harvesting
from scripts.sae_training import training
from scripts.sae_training.harvest import HELD_OUT, TRAIN, Activations, HarvestSettings, harvest
from scripts.sae_training.kinds import KINDS, GatedSae, JumpReluSae, StepSettings, TopKSae, largest_indices
from scripts.sae_training.text import choose_texts, read_documents, text_files, token_rows

LAYERS, K, D_SAE = (0, 2), 4, 48
SETTINGS = HarvestSettings(LAYERS, tokens=3000, held_out_tokens=500, length=32, dtype="float32", rows=4, shard_rows=16)
SENTENCE = "a river ran by the old town where she wrote and he sang of war law and late rain in May 1879"


class Killed(BaseException):
    """Stands for a signal: no code catches it."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Create 600 documents in three formats, some seven of which are held out."""
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    documents = [" ".join(random.choice(SENTENCE.split(), size=random.integers(20, 60))) for _ in range(600)]
    (folder / "deep").mkdir()
    for i, document in enumerate(documents[:20]):
        (folder / "deep" / f"{i}.txt").write_text(document)
    lines = [json.dumps({"text": document}) + "\n" for document in documents[20:]]
    (folder / "some.jsonl").write_text("".join(lines[:200]))
    (folder / "others.jsonl.xz").write_bytes(lzma.compress("".join(lines[200:]).encode()))
    (folder / "notes.md").write_text("not read")
    return folder


@pytest.fixture(scope="module")
def acts(tiny_model, text, tmp_path_factory):
    """Return a harvest that was killed after its second shard and resumed."""
    folder, save, saved = tmp_path_factory.mktemp("work"), harvesting._save, []

    def save_two_shards(path, tensors):
        if path.name.startswith(TRAIN):
            if len(saved) == 2:
                raise Killed
            saved.append(path.name)
        save(path, tensors)

    info = open_model(str(tiny_model))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(harvesting, "_save", save_two_shards)
        harvest(info, SETTINGS, text, folder, quiet=True)
    assert len(list(folder.glob("train_*.safetensors"))) == 2
    before = {path: path.stat().st_mtime_ns for path in folder.glob("train_*.safetensors")}
    found = harvest(info, SETTINGS, text, folder, threads=2, quiet=True)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())  # not created again
    return found


def test_all_formats_are_read_and_held_out_text_is_not_trained_on(text):
    files = text_files(text)
    everything = list(read_documents(files))
    assert len(everything) == 600
    few = choose_texts(text, tokens=300, held_out_tokens=10**6, seed=0)
    every = choose_texts(text, tokens=10**6, held_out_tokens=10**6, seed=0)
    assert sorted(every.train + every.held_out) == sorted(everything)
    assert set(few.train) < set(every.train)
    assert few.held_out == every.held_out
    assert not set(every.train) & set(every.held_out)
    with pytest.raises(RequestError, match=r"no \.txt"):
        text_files(text / "nothing")


def test_broken_lines_are_reported(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"title": "b"}\n')
    with pytest.raises(RequestError, match=r"bad.jsonl, line 2"):
        list(read_documents(text_files(tmp_path)))


def test_rows_begin_with_bos_and_hold_every_token_once(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["she wrote of war", "rain in May", "a river ran by the old town"] * 3
    plain = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    bos = tokenizer.bos_token_id
    rows = token_rows(texts, tokenizer, bos, length=6, tokens=10**6)
    assert bool((rows[:, 0] == bos).all())
    kept = [token for token in rows.flatten().tolist() if token != bos]
    assert kept == plain[: len(kept)]
    assert len(plain) - len(kept) < 6
    assert len(token_rows(texts, tokenizer, bos, length=6, tokens=11)) == 3
    without = token_rows(texts, tokenizer, None, length=5, tokens=10**6)
    assert without.flatten().tolist() == plain[: without.numel()]


def test_a_harvest_is_what_plain_transformers_gives_without_bos_and_sinks(acts, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    rows = load_file(acts.folder / "rows.safetensors")
    bos, last = model.config.bos_token_id, []
    for part in (TRAIN, HELD_OUT):
        found = {layer: torch.cat([acts.read(part, i, layer) for i in range(acts.shards(part))]) for layer in LAYERS}
        with torch.no_grad():  # its `hidden_states[-1]` is after the final norm, so the last layer needs a hook
            hook = model.base_model.layers[2].register_forward_hook(lambda _m, _a, out: last.append(out))
            states = model(rows[part].long(), output_hidden_states=True).hidden_states
            hook.remove()
        plain = {0: states[1], 2: last[-1]}
        kept = rows[part] != bos
        for layer in LAYERS:
            kept &= plain[layer].norm(dim=-1) <= acts.scales[layer].norm_limit
        for layer in LAYERS:
            torch.testing.assert_close(found[layer], plain[layer][kept], rtol=1e-4, atol=1e-5)
        row = torch.arange(len(kept))[:, None].expand_as(kept)[kept]
        assert torch.equal(torch.cat([acts.text_rows(part, i) for i in range(acts.shards(part))]), row)
        assert acts.tokens(part) == int(kept.sum())


def test_a_work_folder_rejects_other_settings(acts, tiny_model, text):
    other = HarvestSettings(LAYERS, tokens=2000, length=32)
    with pytest.raises(RequestError, match="another settings"):
        harvest(open_model(str(tiny_model)), other, text, acts.folder)


def plain_codes(kind: str, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    product = (x - w["b_dec"]) @ w["W_enc"]
    if kind == "gated":
        magnitude = np.maximum(product * np.exp(w["r_mag"]) + w["b_mag"], 0)
        return np.where(product + w["b_gate"] > 0, magnitude, 0)
    pre = np.maximum(product + w["b_enc"], 0)
    floor = np.sort(pre, axis=1)[:, -K, None] if kind == "topk" else np.nextafter(w["threshold"], np.inf)
    return np.where(pre >= floor, pre, 0)


@pytest.fixture(scope="module")
def trained(acts, tmp_path_factory):
    """Train every kind at both layers, killed after step 3 of 8 and resumed; and the same without interruption."""
    step = StepSettings(batch=128, dead_after=200)
    settings = training.TrainSettings(tuple((kind, K) for kind in KINDS), LAYERS, D_SAE, 8 * 128, step=step)
    killed, whole = (tmp_path_factory.mktemp(name) for name in ("killed", "whole"))
    step_once, steps = training.train_step, []

    def few_steps(sae, *args):
        if len(steps) == 3 * len(KINDS) * len(LAYERS):
            raise Killed
        steps.append(sae)
        return step_once(sae, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "train_step", few_steps)
        training.train(acts, settings, killed, minutes_between_checkpoints=0, quiet=True)
    count = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", lambda *args: count.append(1) or step_once(*args))
        resumed = training.train(acts, settings, killed, threads=2, quiet=True)
    assert len(count) == 5 * len(KINDS) * len(LAYERS)
    return resumed, training.train(acts, settings, whole, quiet=True), settings


def test_a_resumed_training_gives_the_same_weights_to_the_bit(trained):
    resumed, whole, _ = trained
    for one, other in zip(resumed, whole, strict=True):
        assert (one.kind, one.k, one.layer) == (other.kind, other.k, other.layer)
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in other.weights)


def test_a_checkpoint_rejects_other_settings(acts, trained, tmp_path):
    _, _, settings = trained
    training.Checkpoint(tmp_path, settings, acts).save(1, [], [])
    other = training.TrainSettings(settings.saes, settings.layers, settings.d_sae, settings.tokens, seed=1)
    with pytest.raises(RequestError, match="other settings"):
        training.train(acts, other, tmp_path, quiet=True)


def test_figures_of_saved_saes_equal_plain_arithmetic(acts, trained, tmp_path):
    _, whole, settings = trained
    for sae in whole:
        folder, found = train_saes.save(sae, acts, settings, "tiny", "made-up text.", tmp_path)
        x = torch.cat([acts.read(HELD_OUT, i, sae.layer) for i in range(acts.shards(HELD_OUT))]).double().numpy()
        saved = load_file(folder / f"blocks.{sae.layer}.hook_resid_post" / "sae_weights.safetensors")
        w = {name: tensor.double().numpy() for name, tensor in saved.items()}
        z = plain_codes(sae.kind, w, x)
        recon = z @ w["W_dec"] + w["b_dec"]
        fvu = ((x - recon) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        assert found.fvu == pytest.approx(fvu, rel=1e-3)
        assert found.l0 == pytest.approx((z > 0).sum(1).mean(), rel=1e-2)
        assert found.dead == pytest.approx((~(z > 0).any(0)).mean(), abs=0.03)
        assert found.tokens == len(x)
        assert 0.5 * K < found.l0 < 2 * K
        config = json.loads((folder / f"blocks.{sae.layer}.hook_resid_post" / "cfg.json").read_text())
        assert config["metadata"]["held_out"]["fvu"] == found.fvu
    assert open_sae(str(folder)).layers == LAYERS
    card = (folder / "README.md").read_text()
    assert all(f"| {layer} | 0.00 | 0.00 |" in card for layer in LAYERS)
    assert "made-up text." in card


@pytest.mark.slow
def test_sae_lens_reads_what_is_saved(acts, trained, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    _, whole, settings = trained
    for sae in whole:
        folder, _ = train_saes.save(sae, acts, settings, "tiny", "made-up text.", tmp_path)
        x = acts.read(HELD_OUT, 0, sae.layer).float()
        theirs = sae_lens.SAE.load_from_disk(folder / f"blocks.{sae.layer}.hook_resid_post")
        ours = load_sae(str(folder), sae.layer)
        with torch.no_grad():
            torch.testing.assert_close(ours.decode(ours.encode(x), x), theirs(x), rtol=1e-3, atol=1e-4)


def test_training_lowers_the_loss_of_every_kind(acts):
    scale = acts.scales[0]
    x = (torch.cat([acts.read(TRAIN, i, 0) for i in range(4)]).float() - scale.mean) / scale.deviation
    for kind in KINDS.values():
        sae = kind(0, K, torch.zeros(x.shape[1]), D_SAE, torch.Generator().manual_seed(0))
        sae.start(x)
        optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
        fvu = []
        for _ in range(60):
            with torch.no_grad():
                fvu.append(float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()))
            training.train_step(sae, optimiser, x, StepSettings())
        assert fvu[-1] < 0.7 * fvu[0], kind.kind


def plain_recons(sae: TopKSae, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the reconstruction by dense products, after those of a matryoshka SAE's prefixes."""
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    if sae.kind == "topk":
        least = pre.topk(sae.k, dim=1).values[:, -1:]
    else:
        least = pre.flatten().topk(sae.k * len(x)).values[-1]
    z = pre * (pre >= least)
    ends = [int(share * len(sae.b_enc)) for share in getattr(sae, "SHARES", ())]
    return [z[:, :end] @ sae.W_dec[:end] + sae.b_dec for end in (*ends, None)]


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_sparse_products_have_the_gradients_of_dense_ones(kind):
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    sae = KINDS[kind](0, 3, torch.ones(5), 16, torch.Generator().manual_seed(1))
    one, gradients = torch.ones(()), []
    for formula in ("ours", "plain"):
        sae.zero_grad()
        if formula == "ours":
            recon, fired, penalty = sae.fit(x, one)
            loss = (x - recon).square().sum() + penalty
        else:
            loss = sum((x - recon).square().sum() for recon in plain_recons(sae, x))
        loss.backward()
        gradients.append({"loss": loss.detach()} | {name: p.grad.clone() for name, p in sae.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), plain_recons(sae, x)[-1], rtol=1e-5, atol=1e-6)
    assert fired.equal(gradients[1]["b_enc"] != 0)


def test_sparse_products_of_gated_saes_have_the_gradients_of_dense_ones():
    """The loss of Rajamanoharan et al. 2024 (arXiv 2404.16014), equation 8, with the decoder shared."""
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    sae = GatedSae(0, 3, torch.ones(5), 16, torch.Generator().manual_seed(1))
    sae.start(x)
    with torch.no_grad():
        sae.r_mag += torch.linspace(-0.5, 0.5, 16)
        sae.b_mag += torch.linspace(-4.0, 0.5, 16)  # some latents are zero behind open gates
    recon, fired, penalty = sae.fit(x, torch.ones(()))
    ((x - recon).square().sum() + penalty).backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}

    sae.zero_grad()
    product = (x - sae.b_dec) @ sae.W_enc.T
    gate = torch.relu(product + sae.b_enc)
    z = torch.relu(product * sae.r_mag.exp() + sae.b_mag) * (gate > 0)
    plain = z @ sae.W_dec + sae.b_dec
    of_gates = gate @ sae.W_dec.detach() + sae.b_dec.detach()
    loss = (x - plain).square().sum() + (x - of_gates).square().sum()
    (loss + sae.weight * gate.sum(1).mean() / 5**0.5).backward()
    torch.testing.assert_close(recon, plain, rtol=1e-5, atol=1e-6)
    assert fired.equal((z > 0).any(0))
    assert 0 < int((z > 0).sum()) < int((gate > 0).sum())
    for name, p in sae.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-5)


def test_largest_indices_equal_topk():
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    for n in (1, 500, 40_000, 299_999):
        assert set(largest_indices(values, n).tolist()) == set(values.topk(n).indices.tolist())
    flat = torch.zeros(200_000)  # more ties than requested
    assert len(set(largest_indices(flat, 1000).tolist())) == 1000


def test_thresholds_rise_when_too_many_latents_are_open():
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    sae = JumpReluSae(0, 2, torch.zeros(8), 32, torch.Generator().manual_seed(1))
    sae.start(x)
    sae.k = 1  # half as many as are active
    before = sae.log_threshold.detach().clone()
    sae.fit(x, torch.ones(())).penalty.backward()
    assert float((before - 0.1 * sae.log_threshold.grad).mean()) > float(before.mean())


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(["--saes", "topk"], "KIND-K"), (["--saes", "relu-3"], "KIND-K"), (["--saes", "topk-3", "--layers", "7"], "7")],
)
def test_wrong_requests_end_with_2(acts, tmp_path, monkeypatch, capsys, arguments, what):
    command = ["train_saes", "train", "--work_dir", str(acts.folder), "--output_directory", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    try:
        code = train_saes.main()
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert what in capsys.readouterr().err


def test_training_without_activations_ends_with_2(tmp_path, monkeypatch, capsys):
    flags = ["--work_dir", str(tmp_path), "--output_directory", str(tmp_path), "--saes", "topk-3"]
    monkeypatch.setattr(sys, "argv", ["train_saes", "train", *flags])
    assert train_saes.main() == 2
    assert "no activations" in capsys.readouterr().err


def test_activations_know_their_settings(acts):
    assert Activations.open(acts.folder).settings["tokens"] == SETTINGS.tokens
