"""Evaluators in the trainers of SAE Lens and sparsify and in a plain loop, and the loggers of their numbers."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import os
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_MODEL, D_SAE, people, write_csv
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from transformers import AutoModelForCausalLM

import delta_selectivity as ds
from delta_selectivity.api.budget import FIRST_ROWS, fitting_rows
from delta_selectivity.api.training_names import HIGH, LOW, for_training, intervals

MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny-pythia"
FAST = ds.Settings(folds=3, repeats=2)
LAYER = 1
HEAD = f"delta/people/layer_{LAYER}"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "people.csv", people(200))


@pytest.fixture(scope="module")
def evaluator(tiny_model, task):
    return ds.Evaluator(tiny_model, LAYER, task, settings=FAST, device="cpu")


@pytest.fixture(scope="module")
def activations(tiny_model):
    """Return activations [rows, d] of the layer, of random tokens."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.randint(model.config.vocab_size, (32, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[LAYER + 1].flatten(0, 1)


def random_states() -> list:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # noqa: NPY002


# --- SAE Lens

KINDS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 8}),
    "scaled": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 8, "normalize_activations": "expected_average_only_in"}),
    "whitened": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 8, "normalize_activations": "covariance_whitening"}),
    "half": (StandardTrainingSAE, StandardTrainingSAEConfig, {"l1_coefficient": 0.1, "dtype": "bfloat16"}),
    "layer_norm": (StandardTrainingSAE, StandardTrainingSAEConfig, {"l1_coefficient": 0.1,
                                                                    "normalize_activations": "layer_norm"}),
}  # fmt: skip


def lens_trainer(x, kind="topk", steps=6, evaluator=None, every=None):
    torch.manual_seed(0)
    make, config, options = KINDS[kind]
    sae = make(config(d_in=D_MODEL, d_sae=D_SAE, **options))
    logger = LoggingConfig(log_to_wandb=every is not None, wandb_log_frequency=1, eval_every_n_wandb_logs=every or 1)
    cfg = SAETrainerConfig(
        total_training_samples=steps * 256, train_batch_size_samples=256, lr=3e-3, lr_end=3e-4, lr_warm_up_steps=2,
        lr_decay_steps=2, n_batches_for_norm_estimate=4, logger=logger,
    )  # fmt: skip
    batches = (x[i : i + 256].to(sae.dtype) for i in itertools.cycle(range(0, len(x) - 255, 256)))
    return SAETrainer(cfg, sae, batches, evaluator=evaluator)


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluator_does_not_change_training_in_sae_lens(kind, evaluator, activations):
    plain, watched = lens_trainer(activations, kind), lens_trainer(activations, kind)
    plain.fit()
    states = random_states()
    seen: list[tuple[int, dict]] = []
    measured: list[dict] = []
    callback = ds.Callback(evaluator, every=2, log=lambda numbers, step: seen.append((step, numbers)))
    step_of = watched.step

    def step(batch):
        found = step_of(batch)
        kept = copy.deepcopy(watched.activation_scaler)
        measured.append(evaluator(watched.sae, watched.data_provider, kept))  # as the trainer calls it
        assert watched.sae.training
        return found

    watched.step = step
    with callback.attach(watched):
        watched.fit()
    assert random_states() == states
    assert all(torch.equal(a, b) for a, b in zip(plain.sae.parameters(), watched.sae.parameters(), strict=True))
    assert watched.optimizer.state_dict()["state"].keys() == plain.optimizer.state_dict()["state"].keys()
    assert [step for step, _ in seen] == [1, 3, 5], "the steps that the trainer gives W&B"
    for step, numbers in seen:
        assert {name: n for name, n in numbers.items() if name != "delta/seconds"} == measured[step]
    values = [numbers[f"{HEAD}/fvu_whole"] for _, numbers in seen]
    assert len(set(values)) == 3
    if kind in ("topk", "scaled", "whitened"):
        last = evaluator(watched.sae)  # by now the trainer has folded its scaling in
        assert last["people/fvu_whole"] == values[-1]
        assert last["transfer_r2"] == seen[-1][1][f"delta/layer_{LAYER}/transfer_r2"]


def test_scaled_inputs_give_the_codes_that_the_trainer_computes(evaluator, activations, tiny_model):
    """Compared with the trainer's own forward pass in NumPy: a missing scaling would change the FVU."""
    rows = probed_rows(evaluator, tiny_model)
    for kind in ("topk", "scaled", "whitened", "layer_norm"):
        trainer = lens_trainer(activations, kind, steps=30)
        trainer.step(next(trainer.data_provider))
        scaler = ActivationScaler()
        if kind == "scaled":
            scaler.estimate_scaling_factor(D_MODEL, trainer.data_provider, 4)
        elif kind == "whitened":
            scaler.estimate_whitening(D_MODEL, trainer.data_provider, 4)
        numbers = evaluator(trainer.sae, iter(()), scaler)
        with torch.no_grad():
            recon = scaler.unscale(trainer.sae.eval()(scaler.scale(rows))).numpy()
        lost = np.square(recon - rows.numpy()).sum() / np.square(rows.numpy() - rows.numpy().mean(0)).sum()
        assert numbers[f"{HEAD}/fvu_pos"] == pytest.approx(lost, rel=2e-3)


def probed_rows(evaluator, folder):
    """Return the model's activations at the probed positions, by plain forward passes."""
    texts, model = evaluator._tokenised, AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for ids, last in zip(texts.ids, texts.last, strict=True):
        with torch.no_grad():
            states = model(torch.tensor(ids)[None].long(), output_hidden_states=True).hidden_states
        found.append(states[LAYER + 1][0, last])
    return torch.stack(found)


def test_an_sae_that_diverges_does_not_end_its_training(evaluator, caplog):
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=8))
    sae.W_dec.data[0] = torch.nan
    assert evaluator(sae, iter(()), ActivationScaler()) == {}
    seen = []
    assert ds.Callback(evaluator, every=1, log=lambda *found: seen.append(found))(sae, 1) is None
    assert seen == []
    assert "not measured" in caplog.text
    with pytest.raises(ds.RequestError, match="W_dec has NaN") as refused:
        evaluator(sae)
    assert refused.value.field == "sae"


def test_a_warning_about_an_sae_in_training_comes_once(tiny_model, task, caplog):
    evaluator = ds.Evaluator(tiny_model, LAYER, task, settings=FAST, device="cpu")
    for seed in range(3):
        torch.manual_seed(seed)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=2, decoder_init_norm=9.0))
        evaluator(sae, iter(()), ActivationScaler())
    assert sum("FVU" in line for line in evaluator.warnings) == 1
    assert sum("FVU" in line for line in caplog.messages) == 1
    evaluator(sae)
    assert sum("FVU" in line for line in evaluator.warnings) == 2, "of an SAE that somebody asks about"


# --- sparsify


def sparsify_trainer(folder, out, optimizer="signum", hookpoints=("layers.1",), steps=6, **options):
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(model.config.vocab_size, (8 * steps, 32), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict({"input_ids": ids.numpy()}).with_format("torch")
    sae = SparseCoderConfig(num_latents=D_SAE, k=8, transcode=options.pop("transcode", False))
    cfg = TrainConfig(
        sae, batch_size=8, optimizer=optimizer, lr=3e-3, hookpoints=list(hookpoints), save_every=10_000,
        save_dir=str(out), log_to_wandb=False, **options,
    )  # fmt: skip
    return Trainer(cfg, data, model)


@pytest.mark.parametrize(
    ("optimizer", "options"), [("signum", {}), ("adam", {"lr_warmup_steps": 2}), ("muon", {"grad_acc_steps": 2})]
)
def test_a_callback_does_not_change_training_in_sparsify(optimizer, options, evaluator, tiny_model, tmp_path):
    plain, watched = (sparsify_trainer(tiny_model, tmp_path / name, optimizer, **options) for name in ("a", "b"))
    torch.manual_seed(0)
    plain.fit()
    states, seen = random_states(), []
    ds.Callback(evaluator, every=2, log=lambda numbers, step: seen.append((step, numbers))).attach(watched)
    torch.manual_seed(0)
    watched.fit()
    assert random_states() == states
    for a, b in zip(plain.saes["layers.1"].parameters(), watched.saes["layers.1"].parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, a.nan_to_num())
    assert [step for step, _ in seen] == ([2] if "grad_acc_steps" in options else [2, 4, 6])
    if optimizer != "muon":  # its last step is measured: what the trainer saves at its end
        saved = evaluator(ds.load_sae(str(tmp_path / "b" / "unnamed"), LAYER))
        assert saved["people/fvu_whole"] == seen[-1][1][f"{HEAD}/fvu_whole"]


def test_only_saes_of_the_layer_are_measured_in_sparsify(evaluator, tiny_model, task, tmp_path):
    trainer = sparsify_trainer(tiny_model, tmp_path, hookpoints=("layers.1", "layers.2"), init_seeds=[1, 2], steps=2)
    seen = []
    ds.Callback(evaluator, every=2, log=lambda numbers, step: seen.append(numbers)).attach(trainer)
    trainer.fit()
    (numbers,) = seen
    one, two = (numbers[f"delta/seed{seed}/people/layer_1/transfer_r2"] for seed in (1, 2))
    assert one != two
    other = sparsify_trainer(tiny_model, tmp_path, hookpoints=("layers.2",), steps=2)
    with pytest.raises(
        ds.RequestError, match=r"it trains layers\.2, but the evaluator measures layer 1, resid_post"
    ) as refused:
        ds.Callback(evaluator).attach(other)
    assert refused.value.field == "trainer"


def test_a_transcoder_of_sparsify_is_measured_where_it_reads_and_writes(tiny_model, task, tmp_path):
    settings = ds.Settings(folds=3, repeats=1, hookpoint="mlp_out")
    evaluator = ds.Evaluator(tiny_model, LAYER, task, input_hookpoint="mlp_in", settings=settings, device="cpu")
    trainer = sparsify_trainer(tiny_model, tmp_path, hookpoints=("layers.1.mlp",), steps=2, transcode=True)
    seen = []
    ds.Callback(evaluator, every=2, log=lambda numbers, step: seen.append(numbers)).attach(trainer)
    trainer.fit()
    assert seen[0]["delta/people/layer_1_mlp_out/fvu_whole"] > 0


# --- a custom loop


def test_one_line_in_a_plain_loop(evaluator, activations, tmp_path):
    sae = torch.nn.Sequential(torch.nn.Linear(D_MODEL, D_SAE), torch.nn.ReLU(), torch.nn.Linear(D_SAE, D_MODEL))

    class Coder(torch.nn.Module):
        d_in = D_MODEL

        def __init__(self):
            super().__init__()
            self.net = sae

        def encode(self, x):
            return self.net[:2](x)

        def decode(self, codes):
            return self.net[2](codes)

    coder = Coder()
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-2)
    callback = ds.Callback(evaluator, every=2, log=[ds.CsvLogger(tmp_path / "a" / "training.csv")])
    for step in range(1, 7):
        loss = (coder.decode(coder.encode(activations)) - activations).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert (callback(coder, step) is None) == (step % 2 == 1)
    with (tmp_path / "a" / "training.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["step"] for line in lines} == {"2", "4", "6"}
    last = {line["name"]: line for line in lines if line["step"] == "6"}
    expected = evaluator(coder)
    for name, score, low, high in (
        (f"{HEAD}/delta_sel", "people/delta_sel", "people/ci_low", "people/ci_high"),
        (f"{HEAD}/sae_sel", "people/sae_sel", "people/sae_ci_low", "people/sae_ci_high"),
        (f"delta/layer_{LAYER}/transfer_r2", "transfer_r2", "transfer_r2_ci_low", "transfer_r2_ci_high"),
    ):
        line = last[name]
        assert [float(line[column]) for column in ("value", "ci_low", "ci_high")] == [
            expected[score], expected[low], expected[high]
        ]  # fmt: skip
    assert float(last[f"{HEAD}/fvu_whole"]["value"]) == expected["people/fvu_whole"]
    assert last[f"{HEAD}/fvu_whole"]["ci_low"] == ""
    assert not any(name.endswith((LOW, HIGH)) for name in last)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda evaluator: ds.Callback(evaluator, every=0), "every"),
        (lambda evaluator: ds.Callback(evaluator, log=[3]), "log"),
        (lambda evaluator: ds.Callback(evaluator).attach(torch.nn.Linear(2, 2)), "trainer"),
        (lambda evaluator: ds.CsvLogger("/dev/null/x.csv"), "path"),
        (lambda evaluator: ds.WandbLogger()({}, 1), "log"),
    ],
)
def test_a_wrong_argument_names_its_field(make, field, evaluator):
    with pytest.raises(ds.RequestError) as refused:
        make(evaluator)
    assert refused.value.field == field
    assert "\n" not in str(refused.value)


# --- loggers

NUMBERS = {"delta_sel": -0.1, "delta_sel_ci_low": -0.2, "delta_sel_ci_high": 0.0, "two/women/transfer_r2": 0.5,
           "two/women/transfer_r2_ci_low": 0.4, "two/women/transfer_r2_ci_high": 0.6, "two/fvu_pos": 0.3,
           "two/women/n_iter": 8.0}  # fmt: skip


def test_names_group_by_task_and_layer_and_bounds_stand_beside_their_score():
    found = for_training(NUMBERS, 3, "mlp_out")
    assert found == {
        "delta/layer_3_mlp_out/delta_sel": -0.1,
        "delta/layer_3_mlp_out/delta_sel_ci_low": -0.2,
        "delta/layer_3_mlp_out/delta_sel_ci_high": 0.0,
        "delta/two/women/layer_3_mlp_out/transfer_r2": 0.5,
        "delta/two/women/layer_3_mlp_out/transfer_r2_ci_low": 0.4,
        "delta/two/women/layer_3_mlp_out/transfer_r2_ci_high": 0.6,
        "delta/two/layer_3_mlp_out/fvu_pos": 0.3,
    }
    assert intervals(found) == ["delta/layer_3_mlp_out/delta_sel", "delta/two/women/layer_3_mlp_out/transfer_r2"]


def test_tensorboard_has_the_numbers_and_draws_intervals_as_bands(tmp_path):
    pytest.importorskip("tensorboard", reason="no tensorboard: pip install -r requirements-dev.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    log = ds.TensorBoardLogger(tmp_path)
    found = for_training(NUMBERS, 3, "resid_post")
    log(found, 100)
    log({name: value + 1 for name, value in found.items()}, 200)
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert set(seen.Tags()["scalars"]) == set(found)
    for name, value in found.items():
        assert [(event.step, event.value) for event in seen.Scalars(name)] == [
            (100, pytest.approx(value)), (200, pytest.approx(value + 1))
        ]  # fmt: skip
    (told,) = seen.Tensors("custom_scalars__config__")
    layout = Layout.FromString(told.tensor_proto.string_val[0])
    charts = {chart.title: chart.margin.series[0] for category in layout.category for chart in category.chart}
    assert charts.keys() == set(intervals(found))
    band = charts["delta/two/women/layer_3/transfer_r2"]
    assert [band.value, band.lower, band.upper] == [f"delta/two/women/layer_3/transfer_r2{end}" for end in
                                                    ("", LOW, HIGH)]  # fmt: skip


def test_missing_tensorboard_error_says_what_to_install(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ds.RequestError, match="the package tensorboard is not installed"):
        ds.TensorBoardLogger(tmp_path)


@pytest.fixture
def wandb_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="no wandb: pip install -r requirements-dev.txt")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    run = wandb.init(project="test", dir=str(tmp_path), mode="offline")
    yield run
    run.finish()


def rows_of(run, folder):
    """Return the rows that an offline run has written, each a dict."""
    from wandb.proto import wandb_internal_pb2

    run.finish()
    (file,) = folder.rglob("run-*.wandb")
    for _ in range(100):  # W&B's own process writes it and may not be finished yet
        records = [wandb_internal_pb2.Record.FromString(data) for data in records_in(file.read_bytes())]
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
            rows.append({key: json.loads(value) for key, value in items})
    return rows


def records_in(data):
    """Read the records of a file in LevelDB's log format: blocks of 32 KiB, a record in one piece or several."""
    place, parts = 7, []
    while place + 7 <= len(data):
        left = 32_768 - place % 32_768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield b"".join(parts)
            parts = []


def test_wandb_has_the_numbers_by_step_even_where_the_trainer_is_ahead(wandb_run, tmp_path):
    log = ds.WandbLogger()
    log({"delta/gender/layer_3/transfer_r2": 0.5}, 100)
    wandb_run.log({"loss": 1.0}, step=100)
    wandb_run.log({"loss": 0.5}, step=150)
    log({"delta/gender/layer_3/transfer_r2": 0.6}, 120)
    rows = [row for row in rows_of(wandb_run, tmp_path) if "delta/step" in row]
    found = [(row["delta/step"], row["delta/gender/layer_3/transfer_r2"]) for row in rows]
    assert found == [(100, 0.5), (120, 0.6)]
    assert rows[0]["loss"] == 1.0
    assert rows[0]["_step"] == 100


@pytest.mark.parametrize("route", ["evaluator", "callback"])
def test_sae_lens_with_offline_wandb_and_tensorboard(route, wandb_run, evaluator, activations, tmp_path):
    pytest.importorskip("tensorboard", reason="no tensorboard: pip install -r requirements-dev.txt")
    given = evaluator if route == "evaluator" else None
    trainer = lens_trainer(activations, "scaled", evaluator=given, every=2)
    if route == "callback":
        log = [ds.TensorBoardLogger(tmp_path / "board"), ds.WandbLogger()]
        ds.Callback(evaluator, every=2, log=log).attach(trainer)
    trainer.fit()
    plain = lens_trainer(activations, "scaled")
    plain.fit()
    assert all(torch.equal(a, b) for a, b in zip(plain.sae.parameters(), trainer.sae.parameters(), strict=True))
    rows = [row for row in rows_of(wandb_run, tmp_path) if f"{HEAD}/transfer_r2" in row]
    assert [row["_step"] for row in rows] == [1, 3, 5]
    for row in rows:
        assert {f"{HEAD}/delta_sel", f"{HEAD}/fvu_whole", f"{HEAD}/transfer_r2_ci_low"} <= row.keys()
        assert "losses/overall_loss" in row, "in the row of the trainer's own numbers"
    assert rows[-1][f"{HEAD}/transfer_r2"] == evaluator(trainer.sae)["people/transfer_r2"]
    if route == "callback":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        seen = EventAccumulator(str(tmp_path / "board")).Reload().Scalars(f"{HEAD}/transfer_r2")
        assert [(event.step, event.value) for event in seen] == [
            (row["_step"], pytest.approx(row[f"{HEAD}/transfer_r2"])) for row in rows
        ]


# --- the budget


@pytest.mark.parametrize(
    ("fixed", "each", "seconds", "most", "expected"),
    [
        (0.1, 0.001, 2.0, 100_000, 1700),  # 0.9 x 2 s
        (0.1, 0.001, 2.0, 900, 900),
        (0.1, 0.001, 0.2, 100_000, FIRST_ROWS),  # it takes 0.6 s for any number of rows
        (0.0, 0.001, 1e9, 100_000, 32_000),
        (5.0, 0.001, 8.0, 100_000, 2200),
        (0.1, 0.001, 2.0, 80, 80),
    ],
)
def test_rows_are_chosen_by_the_time_that_calls_take(fixed, each, seconds, most, expected):
    asked = []

    def seconds_at(n):
        asked.append(n)
        return fixed + each * n

    found = fitting_rows(seconds_at, seconds, most)
    assert found == asked[-1] == pytest.approx(expected, rel=0.03)
    assert found <= most
    assert fixed + each * found <= seconds or found == FIRST_ROWS


def test_a_budget_reports_rows_seconds_and_precision(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("delta_selectivity.api.budget.FIRST_ROWS", 100)
    monkeypatch.setattr("delta_selectivity.api.evaluator.FIRST_ROWS", 100)
    task = write_csv(tmp_path / "people.csv", people(1200))
    evaluator = ds.Evaluator(tiny_model, LAYER, task, seconds=30.0, rows=400, settings=FAST, device="cpu")
    assert evaluator.budget is None
    saes = []
    for step in range(3):
        torch.manual_seed(step)
        saes.append(TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=4 * 2**step)))
    first = evaluator(saes[0])
    budget = evaluator.budget
    n = len(evaluator._work.texts.mentions)
    assert 100 < n <= 400
    assert budget.rows == {"people": n} == {"people": int(first["people/n_rows"])}
    assert 0 < budget.seconds < 30
    assert str(budget).startswith(f"{n} rows of people ({budget.people['people']} people); ")
    for sae in saes[1:]:
        numbers = evaluator(sae)
        assert numbers["people/n_rows"] == n, "the same rows for all"
        for score, half in budget.precision.items():
            assert (numbers[f"{score}_ci_high"] - numbers[f"{score}_ci_low"]) / 2 < 1.5 * half
    alone = ds.Evaluator(tiny_model, LAYER, task, rows=n, settings=FAST, device="cpu")
    assert alone(saes[0]) == first, "as if these rows had been asked for"
    assert alone.budget.rows == budget.rows


def test_an_unattainable_time_is_reported(tiny_model, task, caplog):
    evaluator = ds.Evaluator(tiny_model, LAYER, task, seconds=1e-6, settings=FAST, device="cpu")
    evaluator(TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=8)))
    assert any("more than `seconds` 1e-06" in line for line in evaluator.warnings)
    with pytest.raises(ds.RequestError) as refused:
        ds.Evaluator(tiny_model, LAYER, task, seconds=0)
    assert refused.value.field == "seconds"


# --- the bundled model in a realistic training


def bundled_lens(model, ids):
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[4].flatten(0, 1)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=256, d_sae=2048, k=32))
    batches = (x[i : i + 1024] for i in itertools.cycle(range(0, len(x) - 1023, 1024)))
    trainer = SAETrainer(SAETrainerConfig(300 * 1024, 1024, lr_end=3e-5), sae, batches)
    return trainer, sae


def bundled_sparsify(model, ids):
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    cfg = TrainConfig(SparseCoderConfig(num_latents=2048, k=32), batch_size=8, hookpoints=["layers.3"],
                      save_dir=os.environ["WANDB_DIR"], log_to_wandb=False)  # fmt: skip
    data = Dataset.from_dict({"input_ids": ids.repeat(10, 1)[:2400].numpy()}).with_format("torch")
    trainer = Trainer(cfg, data, model)
    return trainer, trainer.saes["layers.3"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("make", [bundled_lens, bundled_sparsify])
def test_measuring_takes_at_most_a_tenth_of_the_training_time(make, wandb_run, tmp_path):
    """500 rows of gender every 100 steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluator = ds.Evaluator(MODEL, 3, "gender", rows=500, device="cpu")
    callback = ds.Callback(evaluator, every=100, log=[ds.TensorBoardLogger(tmp_path / "board"), ds.WandbLogger()])
    weights = []
    for watched in (False, True):
        model = AutoModelForCausalLM.from_pretrained(MODEL)
        ids = torch.randint(model.config.vocab_size, (256, 128), generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        trainer, sae = make(model, ids)
        if watched:
            evaluator(sae)  # one-time costs of a process
            callback.attach(trainer)
        start = time.perf_counter()
        trainer.fit()
        took = time.perf_counter() - start
        weights.append([p.detach().clone() for p in sae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    share = callback.seconds / (took - callback.seconds)
    first = 99 if make is bundled_lens else 100
    rows = [row for row in rows_of(wandb_run, tmp_path) if "delta/step" in row]
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    for score in ("delta_sel", "transfer_r2", "fvu_whole"):
        name = f"delta/gender/layer_3/{score}"
        assert [row["delta/step"] for row in rows] == [first, first + 100, first + 200]
        assert [event.value for event in board.Scalars(name)] == [pytest.approx(row[name]) for row in rows]
    assert share < 0.1
