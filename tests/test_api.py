"""The Python API: the same numbers as the program, SAEs in memory, and one evaluator for many SAEs."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_MODEL, D_SAE, N_LAYERS, people, write_csv, write_sparsify
from runs import Request, numbers

import delta_selectivity as ds
from delta_selectivity.models.language_model import LanguageModel
from delta_selectivity.probing.selectivity import ProbeResult
from delta_selectivity.records import result_file

FAST = ds.Settings(folds=3, repeats=2)


class TopK(torch.nn.Module):
    """A minimal TopK SAE."""

    def __init__(self, seed: int = 0, k: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.k = k
        self.W_enc = torch.nn.Parameter(torch.randn(D_MODEL, D_SAE, generator=generator) / D_MODEL**0.5)
        self.W_dec = torch.nn.Parameter(self.W_enc.detach().T.clone())
        self.b_dec = torch.nn.Parameter(torch.zeros(D_MODEL))

    def encode(self, x):
        pre = torch.relu((x - self.b_dec) @ self.W_enc)
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    def decode(self, codes):
        return codes @ self.W_dec + self.b_dec


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    """Create two tasks in one file, with probes on different rows."""
    rows = [{**row, "task": task} for task in ("women", "others") for row in people(160, seed=len(task))]
    return write_csv(tmp_path_factory.mktemp("data") / "two.csv", rows)


@pytest.fixture(scope="module")
def sparser(tmp_path_factory):
    return write_sparsify(tmp_path_factory.mktemp("saes") / "sae-sparser", k=2)


@pytest.fixture(scope="module")
def results(tiny_model, tiny_saes, sparser, two_tasks):
    return ds.evaluate(tiny_model, [tiny_saes, sparser], two_tasks, settings=FAST, device="cpu")


def flat(record: dict) -> dict:
    return {name: float(value) for name, value in record.items() if isinstance(value, bool | int | float)}


def without_q(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.endswith("q_value")}


# --- evaluate


def test_evaluate_and_the_program_give_the_same_files(results, tiny_model, tiny_saes, sparser, two_tasks, tmp_path):
    """The numbers are bitwise identical and the keys are equal, so either can resume the other."""
    asked = Request(tiny_model, (tiny_saes, sparser), two_tasks, tmp_path / "out", ("--folds", "3", "--repeats", "2"))
    assert asked.run() == 0
    saved = results.save(tmp_path / "saved")
    assert numbers(saved) == numbers(asked.out)
    for path in numbers(saved):
        one, other = (result_file.read(folder / path)["_run"] for folder in (saved, asked.out))
        assert (one["key"], one["sae_level"], one["q_family"]) == (other["key"], other["sae_level"], other["q_family"])
    assert asked.into(saved).run() == 0


def test_the_frame_has_a_row_per_sae_dataset_layer_and_probe(results):
    frame = results.to_frame()
    assert len(frame) == len(results) == 2 * N_LAYERS * 2
    assert list(frame.columns[:5]) == ["sae", "baseline", "dataset", "layer", "probe"]
    assert set(frame["sae"]) == set(results.saes)
    assert {"delta_sel", "ci_low", "ci_high", "q_value", "fvu_whole", "l0", "n_people"} <= set(frame.columns)
    assert frame["delta_sel"].notna().all()
    assert "Results" in repr(results)


def test_two_saes_are_compared_as_the_files_say(results):
    one, other = results.saes
    found = results.compare(one, other)
    level = results.files[0][1]["_run"]["sae_level"]["compared"][other]
    assert found.delta_sel.value == level["delta_sel"]
    assert (found.delta_sel.low, found.delta_sel.high) == (level["delta_sel_ci_low"], level["delta_sel_ci_high"])
    assert found.transfer_r2.value == level["transfer_r2"]
    assert found.n_cells == 2 * N_LAYERS
    assert results.compare(result_file.slug(other), result_file.slug(one)).delta_sel.value == pytest.approx(
        -found.delta_sel.value
    )
    with pytest.raises(ds.RequestError, match="no SAE 'none'"):
        results.compare(one, "none")


def test_results_are_saved_loaded_and_reported(results, tmp_path):
    folder = results.save(tmp_path / "kept")
    loaded = ds.Results.load(folder)
    order = ["sae", "layer", "probe"]
    one, other = (found.to_frame().sort_values(order).reset_index(drop=True) for found in (loaded, results))
    assert one.equals(other)
    one, other = loaded.saes
    assert loaded.compare(one, other).delta_sel == results.compare(one, other).delta_sel
    assert results.save(folder) == folder, "the same results again are no conflict"
    assert results.report(tmp_path / "page.html").read_text("utf-8").startswith("<!")
    with pytest.raises(ds.RequestError) as refused:
        ds.Results.load(tmp_path / "nothing")
    assert "no such folder" in str(refused.value)


def test_several_folders_are_loaded_side_by_side(results, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, sae in zip((first, second), sorted(results.save(tmp_path / "all").iterdir()), strict=False):
        shutil.copytree(sae, folder / sae.name)
    loaded = ds.Results.load(first, second)
    order = ["sae", "layer", "probe"]
    one, other = (found.to_frame().sort_values(order).reset_index(drop=True) for found in (loaded, results))
    assert one.equals(other)
    assert loaded.compare(*loaded.saes).delta_sel == results.compare(*loaded.saes).delta_sel
    assert len(ds.Results.load(loaded.save(tmp_path / "together"))) == len(results)
    shutil.copytree(first, tmp_path / "third")
    twice = ds.Results.load(first, tmp_path / "third")
    with pytest.raises(ds.RequestError, match="save them to different folders"):
        twice.save(tmp_path / "twice")


def test_save_does_not_overwrite_other_results(results, tmp_path):
    folder = results.save(tmp_path / "kept")
    victim = sorted(folder.glob("*/*.json"))[0]
    victim.write_text("{}")
    with pytest.raises(ds.RequestError, match="with different results"):
        results.save(folder)
    assert victim.read_text() == "{}"


def test_save_restores_missing_scores_and_rejects_a_folder_in_place_of_a_file(results, tmp_path):
    folder = results.save(tmp_path / "kept")
    for scores in folder.glob("*/*.scores"):
        shutil.rmtree(scores)
    one, other = results.saes
    loaded = ds.Results.load(results.save(folder))
    assert loaded.compare(one, other).delta_sel == results.compare(one, other).delta_sel
    place = sorted(folder.glob("*/*.json"))[0].relative_to(folder)
    (tmp_path / "other" / place).mkdir(parents=True)
    for wrong in (tmp_path / "other", "a" * 400, "", "a\0b", None):
        with pytest.raises(ds.RequestError) as refused:
            results.save(wrong)
        assert refused.value.field == "folder"


def test_the_temporary_folder_is_removed_with_the_results(tiny_model, tiny_saes, two_tasks):
    found = ds.evaluate(tiny_model, str(tiny_saes), str(two_tasks), layers=0, settings=FAST, device="cpu")
    folder = found.files[0][0].parent
    assert folder.is_dir()
    del found
    assert not folder.exists()


@pytest.mark.filterwarnings("error")
def test_the_temporary_folder_is_removed_silently_after_an_error(tiny_model, two_tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Failing(TopK):
        def decode(self, codes):
            if len(codes) > 2:
                raise ZeroDivisionError
            return super().decode(codes)

    with pytest.raises(ZeroDivisionError):
        ds.evaluate(tiny_model, Failing(), two_tasks, layers=0, settings=FAST, device="cpu")
    with pytest.raises(ds.RequestError):
        ds.evaluate(tiny_model, TopK(), two_tasks, layers=99, settings=FAST, device="cpu")
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_copies_of_results_keep_the_folder_and_a_pickle_keeps_the_numbers(tiny_model, two_tasks):
    found = ds.evaluate(tiny_model, TopK(), two_tasks, layers=0, settings=FAST, device="cpu")
    folder, frame = found.files[0][0].parent, found.to_frame()
    copies, pickled = [copy.copy(found), copy.deepcopy(found)], pickle.dumps(found)
    del found
    gc.collect()
    for copied in copies:
        (name,) = copied.saes
        assert copied.compare(name, name).delta_sel.value == 0
    del copied, copies
    gc.collect()
    assert not folder.exists()
    assert pickle.loads(pickled).to_frame().equals(frame)


def test_a_fork_does_not_remove_the_results_of_its_parent(tiny_model, two_tasks):
    found = ds.evaluate(tiny_model, TopK(), two_tasks, layers=0, settings=FAST, device="cpu")
    folder = found.files[0][0].parent
    child = os.fork()
    if child == 0:
        try:
            del found
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()


def test_ctrl_c_in_evaluate_keeps_the_session_and_waits_for_the_layer(tiny_model, two_tasks, tmp_path):
    """Ctrl-C waits for the current layer; a second one stops at once, and nothing is written afterwards."""
    going_on, handlers = threading.Event(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    class Impatient(TopK):
        def encode(self, x):
            if threading.current_thread().name == "producer" and not going_on.is_set():
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.3)
                going_on.wait(20)
            return super().encode(x)

    asked = {"layers": 0, "settings": FAST, "device": "cpu", "output": tmp_path}
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ds.evaluate(tiny_model, Impatient(), two_tasks, **asked)
    assert time.monotonic() - began < 15
    going_on.set()
    for thread in threading.enumerate():
        if thread.name in ("producer", "consumer"):
            thread.join(20)
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("producer", "consumer")]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not list(tmp_path.iterdir()), "no result, no lock"
    assert len(ds.evaluate(tiny_model, Impatient(), two_tasks, **asked)) == 2


def test_a_call_leaves_no_files(tiny_model, two_tasks):
    before = threading.enumerate()
    ds.evaluate(tiny_model, TopK(), two_tasks, layers=0, settings=FAST, device="cpu")
    assert not [thread.name for thread in threading.enumerate() if thread not in before]


def test_a_module_is_measured_like_the_same_sae_in_a_file(tiny_model, two_tasks, tmp_path):
    sae = TopK()
    folder = tmp_path / "file" / "layers.1"
    folder.mkdir(parents=True)
    weights = {"encoder.weight": sae.W_enc.detach().T.contiguous(), "encoder.bias": torch.zeros(D_SAE)}
    weights |= {"W_dec": sae.W_dec.detach().contiguous(), "b_dec": sae.b_dec.detach()}
    from safetensors.torch import save_file

    save_file(weights, folder / "sae.safetensors")
    config = {"activation": "topk", "k": 8, "d_in": D_MODEL, "num_latents": D_SAE, "expansion_factor": 3}
    (folder / "cfg.json").write_text(json.dumps(config))
    saes = [ds.wrap_sae(sae, layer=1, name="mine"), str(tmp_path / "file")]
    frame = ds.evaluate(tiny_model, saes, two_tasks, layers=1, settings=FAST, device="cpu").to_frame()
    mine, file = (frame[frame["sae"] == name].reset_index(drop=True) for name in ("mine", saes[1]))
    for column in ("delta_sel", "transfer_r2", "fvu_whole", "l0"):
        np.testing.assert_allclose(mine[column], file[column], atol=0.02 if column == "delta_sel" else 1e-4)


def test_a_module_without_a_layer_takes_the_only_requested_one(tiny_model, two_tasks):
    frame = ds.evaluate(tiny_model, TopK(), two_tasks, layers=2, settings=FAST, device="cpu").to_frame()
    assert set(frame["layer"]) == {2}
    with pytest.raises(ds.RequestError) as refused:
        ds.evaluate(tiny_model, TopK(), two_tasks, settings=FAST, device="cpu")
    assert refused.value.field == "layer"


def test_further_training_makes_another_sae(tiny_model, two_tasks, tmp_path):
    sae = TopK()
    asked = {"layers": 1, "settings": FAST, "device": "cpu", "output": tmp_path / "out"}
    ds.evaluate(tiny_model, sae, two_tasks, **asked)
    with torch.no_grad():
        sae.W_dec += 0.1
    with pytest.raises(ds.RequestError, match="made with other settings"):
        ds.evaluate(tiny_model, sae, two_tasks, **asked)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tasks": "no_such_task"}, "tasks"),
        ({"tasks": []}, "tasks"),
        ({"saes": []}, "saes"),
        ({"saes": "/no/such/folder"}, "saes"),
        ({"saes": 3}, "saes"),
        ({"model": "/no/such/folder"}, "model"),
        ({"layers": "0-"}, "layers"),
        ({"layers": [-1]}, "layers"),
        ({"layers": 1.5}, "layers"),
        ({"layers": []}, "layers"),
        ({"tasks": 0}, "tasks"),
        ({"settings": {"folds": 5}}, "settings"),
        ({"model": torch.nn.Linear(3, 3)}, "model"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:7"}, "device"),
        ({"layers": True}, "layers"),
        ({"layers": 99}, "layers"),
        ({"layers": np.array(99)}, "layers"),
        ({"device": ("cpu",)}, "device"),
        ({"device": None}, "device"),
        ({"device": ""}, "device"),
        ({"device": ("cpu", 3)}, "device"),
        ({"tasks": None}, "tasks"),
        ({"tasks": [3]}, "tasks"),
        ({"tasks": "a" * 300}, "tasks"),
        ({"tasks": "a\nb"}, "tasks"),
        ({"saes": None}, "saes"),
        ({"saes": torch.nn.Linear(2, 2)}, "saes"),
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": "a\nb/c\0"}, "model"),
        ({"settings": None}, "settings"),
        ({"settings": {"folds": 3}}, "settings"),
        ({"settings": ds.Settings(hookpoint="x\ny")}, "hookpoint"),
        ({"settings": ds.Settings(folds=1000)}, "folds"),
        ({"output": ""}, "output"),
        ({"output": 3}, "output"),
        ({"output": "a\0b"}, "output"),
        ({"cache": ""}, "cache"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_its_field(tiny_model, tiny_saes, two_tasks, changes, field):
    asked = {"model": tiny_model, "saes": tiny_saes, "tasks": two_tasks, "device": "cpu"} | changes
    with pytest.raises((ds.RequestError, TypeError)) as refused:
        ds.evaluate(**asked)
    assert isinstance(refused.value, ds.RequestError)
    assert "\n" not in str(refused.value)
    assert "--" not in str(refused.value)
    assert field is None or refused.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layer": -1}, "layer"),
        ({"layer": True}, "layer"),
        ({"layer": 1.5}, "layer"),
        ({"layer": "1"}, "layer"),
        ({"layer": 99}, "layer"),
        ({"rows": 0}, "rows"),
        ({"rows": 1}, "rows"),
        ({"whole_tokens": 0}, "whole_tokens"),
        ({"input_hookpoint": 3}, "input_hookpoint"),
        ({"settings": None}, "settings"),
        ({"tasks": []}, "tasks"),
        ({"tasks": "no_such_file.csv"}, "tasks"),
        ({"device": "tpu"}, "device"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_argument_of_an_evaluator_is_one_line_that_names_it(tiny_model, two_tasks, changes, field):
    asked = {"model": tiny_model, "layer": 1, "tasks": two_tasks, "device": "cpu"} | changes
    with pytest.raises(ds.RequestError) as refused:
        ds.Evaluator(**asked)
    assert refused.value.field == field
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("sae", [3, "/no/such/folder", TopK, [TopK()], torch.nn.Linear(3, 3)])
def test_a_wrong_sae_of_a_call_is_named_as_the_argument(evaluator, sae):
    with pytest.raises(ds.RequestError) as refused:
        evaluator(sae)
    assert refused.value.field == "sae"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": np.arange(1000)}, "seed"),
        ({"views": np.array(["error"] * 300)}, "views"),
        ({"views": [["error"]]}, "views"),
        ({"queue_gb": 10**400}, "queue_gb"),
        ({"queue_gb": float("nan")}, "queue_gb"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(changes, field):
    with pytest.raises(ds.RequestError) as refused:
        ds.Settings(**changes)
    assert refused.value.field == field
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes", [{"queue_gb": 1e-12}, {"queue_gb": 1e300, "cache_gb": 1e305}, {"seed": 10**80, "whole_tokens": 50}]
)
def test_settings_of_any_size_are_accepted(tiny_model, two_tasks, tmp_path, changes):
    settings = ds.Settings(folds=3, repeats=1, **changes)
    asked = {"layers": [np.int64(1)], "settings": settings, "device": torch.device("cpu"), "cache": tmp_path}
    assert len(ds.evaluate(tiny_model, (sae for sae in [TopK()]), (t for t in [two_tasks]), **asked)) == 2
    assert ds.Evaluator(tiny_model, np.int64(1), two_tasks, settings=settings, device="cpu")(TopK())


def test_a_lazy_module_is_rejected_and_stays_uninitialised(evaluator):
    class Lazy(torch.nn.Module):
        d_in = D_MODEL

        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = torch.nn.LazyLinear(D_SAE), torch.nn.Linear(D_SAE, D_MODEL)

    sae = Lazy()
    with pytest.raises(ds.RequestError, match="no weights yet"):
        evaluator(sae)
    assert torch.nn.parameter.is_lazy(sae.encode.weight)


def test_nothing_is_printed(tiny_model, tiny_saes, two_tasks, capfd):
    ds.evaluate(tiny_model, tiny_saes, two_tasks, layers=0, settings=FAST, device="cpu")
    told = capfd.readouterr()
    assert told.out == ""
    assert "%|" not in told.err


# --- the evaluator


@pytest.fixture(scope="module")
def evaluator(tiny_model, two_tasks):
    return ds.Evaluator(tiny_model, 1, two_tasks, settings=FAST, device="cpu")


def check_same(found: dict, expected: dict[str, dict]) -> None:
    """Compare every number of a call with the layer of a result file."""
    figures = {name: value for name, value in expected.items() if not isinstance(value, dict)}
    probes = {name: without_q(value) for name, value in expected.items() if isinstance(value, dict)}
    wanted = {f"two/{name}": value for name, value in flat(figures).items()}
    for probe, record in probes.items():
        wanted |= {f"two/{probe}/{name}": value for name, value in flat(record).items()}
    assert {name: value for name, value in found.items() if name.startswith("two/")} == wanted


@pytest.mark.parametrize("settings", [FAST, ds.Settings(folds=3, repeats=1, positions="mean", views="error,latents")])
def test_an_evaluator_gives_the_numbers_of_evaluate_to_the_bit(tiny_model, tiny_saes, sparser, two_tasks, settings):
    evaluator = ds.Evaluator(
        tiny_model, 1, two_tasks, settings=settings, device="cpu", whole_tokens=settings.whole_tokens
    )
    for sae in (tiny_saes, sparser, TopK()):
        whole = ds.evaluate(tiny_model, sae, two_tasks, layers=1, settings=settings, device="cpu")
        ((_, found),) = whole.files
        called = evaluator(sae)
        check_same(called, found["layer_1"])
        level = found["_run"]["sae_level"]
        for name in ("delta_sel", "delta_sel_ci_low", "transfer_r2", "transfer_r2_ci_high"):
            assert called[name] == level[name]


def test_a_call_runs_no_text_and_fits_the_model_once(tiny_model, two_tasks, monkeypatch):
    from delta_selectivity.api import evaluator as module

    forward, calls, fit, fits = LanguageModel.activations, [], module.fit_model, []
    monkeypatch.setattr(LanguageModel, "activations", lambda *given: calls.append(1) or forward(*given))
    monkeypatch.setattr(module, "fit_model", lambda *asked: fits.append(1) or fit(*asked))
    evaluator = ds.Evaluator(tiny_model, 1, two_tasks, settings=FAST, device="cpu")
    assert calls
    assert len(fits) == 2, "one for each set of rows"
    calls.clear()
    first = evaluator(TopK())
    assert evaluator(TopK()) == first
    assert not calls
    assert len(fits) == 2


def test_an_evaluator_without_memory_gives_the_same_numbers(tiny_model, two_tasks, evaluator):
    small = ds.Evaluator(
        tiny_model, 1, two_tasks, settings=ds.Settings(folds=3, repeats=2, queue_gb=1e-5), device="cpu"
    )
    assert small(TopK()) == evaluator(TopK())


def test_measuring_does_not_change_a_training(tiny_model, two_tasks, evaluator):
    def train(watched: bool) -> tuple[list[torch.Tensor], torch.Tensor, list[dict]]:
        torch.manual_seed(3)
        sae, seen = TopK().train(), []
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for step in range(4):
            x = torch.randn(64, D_MODEL)
            loss = (sae.decode(sae.encode(x)) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if watched and step % 2:
                gradients = [p.grad.clone() for p in sae.parameters()]
                seen.append(evaluator(sae))
                assert sae.training
                assert all(torch.equal(p.grad, g) for p, g in zip(sae.parameters(), gradients, strict=True))
            optimizer.step()
        return [p.detach() for p in sae.parameters()], torch.get_rng_state(), seen

    alone, state, _ = train(watched=False)
    watched, state_after, seen = train(watched=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert torch.equal(state, state_after)
    assert seen[0]["two/fvu_whole"] != seen[1]["two/fvu_whole"], "weights that were trained on give other numbers"


class Drawing(TopK):
    """An SAE that draws random numbers while it encodes, in any thread."""

    def encode(self, x):
        return super().encode(x + 1e-6 * torch.randn_like(x))


def test_the_random_state_is_restored_although_threads_draw_numbers(tiny_model, two_tasks, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # so many batches at the same time
    evaluator = ds.Evaluator(
        tiny_model, 1, two_tasks, settings=ds.Settings(folds=3, repeats=1, batch_size=2), device="cpu"
    )
    sae = Drawing()
    for seed in range(5):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        evaluator(sae)
        assert torch.equal(torch.get_rng_state(), before)


def test_autocast_of_the_caller_changes_nothing(evaluator):
    plain = evaluator(TopK())
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluator(TopK()) == plain


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ds.wrap_sae(TopK(), layer=2), "layer 2"),
        (lambda: ds.wrap_sae(TopK(), layer=1, hookpoint="mlp_out"), "mlp_out"),
        (lambda: torch.nn.Linear(3, 3), "encode"),
    ],
)
def test_an_sae_of_another_place_is_rejected_with_one_line(evaluator, make, told):
    with pytest.raises(ds.RequestError) as refused:
        evaluator(make())
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layer": "1"}, "layer"),
        ({"layer": [1]}, "layer"),
        ({"layer": 99}, "layer"),
        ({"rows": 0}, "rows"),
        ({"model": torch.nn.Linear(3, 3)}, "model"),
        ({"settings": None}, "settings"),
    ],
)
def test_a_wrong_argument_of_an_evaluator_names_its_field(tiny_model, two_tasks, changes, field):
    with pytest.raises(ds.RequestError) as refused:
        ds.Evaluator(**{"model": tiny_model, "layer": 1, "tasks": two_tasks, "device": "cpu"} | changes)
    assert refused.value.field == field


def test_an_evaluator_that_can_measure_nothing_is_rejected_at_construction(tiny_model, tmp_path):
    few = write_csv(tmp_path / "few.csv", people(8))
    with pytest.raises(ds.RequestError, match="fewer than the 5 folds"):
        ds.Evaluator(tiny_model, 1, few, device="cpu")


class Unnamed(torch.nn.Module):
    """An SAE whose attributes show no width."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.d = torch.nn.Linear(D_MODEL, D_SAE), torch.nn.Linear(D_SAE, D_MODEL)

    def encode(self, x):
        return torch.relu(self.e(x))

    def decode(self, codes):
        return self.d(codes)


def test_the_evaluator_supplies_the_width_of_an_object(evaluator):
    assert "delta_sel" in evaluator(Unnamed())


def test_reprs_are_short_and_show_the_result(results, two_tasks, tiny_saes):
    assert "95 % interval" in repr(results.compare(*results.saes))
    assert len(repr(ds.load_task(two_tasks))) < 200
    assert len(repr(ds.load_sae(str(tiny_saes), 1))) < 300


def test_an_evaluator_collects_warnings(tiny_model, two_tasks):
    evaluator = ds.Evaluator(tiny_model, 1, two_tasks, rows=60, settings=FAST, device="cpu")
    evaluator(TopK())
    assert any("the interval is unreliable" in line for line in evaluator.warnings)
    before = list(evaluator.warnings)
    evaluator(TopK())
    assert evaluator.warnings == before


# --- encode and decode of other authors


class InPlace(TopK):
    """An SAE that centres its input in place."""

    def encode(self, x):
        x -= 0.1
        return super().encode(x)


class Copying(TopK):
    """The same SAE with a copy of its input."""

    def encode(self, x):
        return super().encode(x - 0.1)


@pytest.mark.parametrize("bos", ["counted", "excluded", "none"])
def test_an_sae_that_changes_its_input_affects_no_result(tiny_model, two_tasks, bos):
    evaluator = ds.Evaluator(tiny_model, 1, two_tasks, settings=ds.Settings(folds=3, repeats=1, bos=bos), device="cpu")
    before = evaluator(TopK())
    assert evaluator(InPlace()) == evaluator(Copying())
    assert evaluator(TopK()) == before


class Odd(TopK):
    """An SAE whose methods return other shapes for more than two rows, the number that wrap_sae tries."""

    def __init__(self, of_codes=lambda codes: codes, of_recon=lambda recon: recon) -> None:
        super().__init__()
        self.of_codes, self.of_recon = of_codes, of_recon

    def encode(self, x):
        codes = super().encode(x)
        return codes if len(x) == 2 else self.of_codes(codes)

    def decode(self, codes):
        recon = super().decode(codes[:, :D_SAE])
        return recon if len(codes) == 2 else self.of_recon(recon)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Odd(lambda codes: codes[: len(codes) // 2]), "encode of"),
        (lambda: Odd(lambda codes: codes.repeat(2, 1)), "encode of"),
        (lambda: Odd(lambda codes: codes.repeat(1, 2)), "encode of"),
        (lambda: Odd(lambda codes: codes[:, :50]), "encode of"),
        (lambda: Odd(lambda codes: codes[0]), "encode of"),
        (lambda: Odd(lambda codes: codes.to_sparse()), "sparse"),
        (lambda: Odd(lambda codes: None), "NoneType"),
        (lambda: Odd(of_recon=lambda recon: recon[:1]), "decode of"),
        (lambda: Odd(of_recon=lambda recon: recon[0]), "decode of"),
        (lambda: Odd(of_recon=lambda recon: recon.sum()), "decode of"),
        (lambda: Odd(of_recon=lambda recon: recon.to(torch.complex64)), "complex"),
    ],
)
def test_a_method_with_wrong_shapes_for_more_rows_is_rejected(evaluator, make, told):
    """PyTorch would broadcast a single row and measure that."""
    with pytest.raises(ds.RequestError) as refused:
        evaluator(make())
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_codes_are_rejected_even_if_the_decoder_ignores_them(tiny_model, two_tasks, evaluator, value):
    class Padded(TopK):
        def encode(self, x):
            return torch.cat([super().encode(x), x.new_full((len(x), 1), value)], dim=1)

        def decode(self, codes):
            return super().decode(codes[:, :-1])

    with pytest.raises(ArithmeticError, match=r"NaN, Inf or values beyond 1e19.* in the codes"):
        evaluator(Padded())
    with pytest.raises(ArithmeticError, match=r"NaN, Inf or values beyond 1e19.* in the codes"):
        ds.evaluate(tiny_model, Padded(), two_tasks, layers=1, settings=FAST, device="cpu")


def in_time(work, seconds: float = 60):
    """Return the result or the error of a function that may hang."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result(seconds)
    finally:
        pool.shutdown(wait=False)


@pytest.mark.parametrize("size", [1e18, 1e25, 1e30])
def test_a_diverged_reconstruction_is_rejected_without_a_hang(evaluator, size):
    """Squares beyond float32 have no Cholesky factor, even with a large ridge."""

    class Diverged(TopK):
        def decode(self, codes):
            return super().decode(codes) * size

    with pytest.raises(ArithmeticError, match="layer 1"):
        in_time(lambda: evaluator(Diverged()))
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    with pytest.raises(ArithmeticError, match="too large"):
        in_time(lambda: ds.probe_selectivity(x, x * 10 * size, x[:, 0] > 0, range(200), settings=FAST))


@pytest.mark.parametrize("size", [1e-40, 1e-44])
def test_activations_below_float32_count_as_constant(size):
    x = (np.random.default_rng(0).normal(size=(200, 6)) * size).astype(np.float32)
    found = in_time(lambda: ds.probe_selectivity(x, x, x[:, 0] > 0, range(200), settings=FAST))
    assert found.model_sel == found.sae_sel == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_codes_of_another_dtype_are_accepted(evaluator, dtype):
    class Other(TopK):
        def encode(self, x):
            return super().encode(x).to(dtype)

    assert evaluator(Other())["two/fvu_whole"] == pytest.approx(evaluator(TopK())["two/fvu_whole"], rel=1e-2)


# --- settings of the caller, and other threads


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


EVERYTHING = ds.Settings(folds=3, repeats=1, views="error,latents", positions="mean", baselines="all", queue_gb=1e-6)


@pytest.mark.parametrize(
    "mode",
    [
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.float16),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        torch.inference_mode,
    ],
    ids=["float64", "float16", "autocast", "default device", "inference"],
)
def test_torch_modes_of_the_caller_change_nothing(tiny_model, two_tasks, mode):
    """Default dtype float16 also stands for another thread in which transformers builds a model and changes it."""
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 6)).astype(np.float32)
    recon, labels, sae = np.round(x), x[:, 0] > 0, TopK()

    def measure() -> list:
        found = ds.evaluate(tiny_model, sae, two_tasks, layers=1, settings=EVERYTHING, device="cpu").to_frame()
        evaluator = ds.Evaluator(tiny_model, 1, two_tasks, settings=EVERYTHING, device="cpu")
        return [found.to_json(double_precision=15), evaluator(sae), ds.probe_selectivity(x, recon, labels, range(200))]

    plain = measure()
    with mode():
        assert measure() == plain


def test_evaluations_in_two_threads_give_the_same_numbers(tiny_model, two_tasks):
    def measure() -> str:  # an SAE that is created while transformers builds a model still has float32 weights
        found = ds.evaluate(tiny_model, TopK(), two_tasks, layers=1, settings=EVERYTHING, device="cpu")
        return found.to_frame().to_json(double_precision=15)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = measure()
        with ThreadPoolExecutor(2) as pool:
            assert [done.result() for done in [pool.submit(measure) for _ in range(4)]] == [alone] * 4
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


# --- a sample of the tokens


def test_a_token_sample_changes_only_the_whole_text_figures_and_little(tiny_model, tiny_saes, two_tasks):
    asked = {"model": tiny_model, "saes": str(tiny_saes), "tasks": two_tasks, "device": "cpu"}
    whole = ds.evaluate(**asked, settings=FAST).to_frame()
    n_tokens = int(whole["n_tokens"].iloc[0])
    few = ds.evaluate(**asked, settings=ds.Settings(folds=3, repeats=2, whole_tokens=n_tokens // 2)).to_frame()
    assert (few["n_tokens"] > 0.4 * n_tokens).all()
    assert (few["n_tokens"] < 0.6 * n_tokens).all()
    np.testing.assert_allclose(few["fvu_whole"], whole["fvu_whole"], rtol=0.05)
    assert (few["mse_whole"] != whole["mse_whole"]).all()
    same = ["model_sel", "sae_sel", "delta_sel", "transfer_sel", "n_people", "n_probed"]
    assert few[same].equals(whole[same])
    for name in ("mse_pos", "fvu_pos", "cosine", "l0", "l1"):
        np.testing.assert_allclose(few[name], whole[name], rtol=1e-5)


def test_a_token_sample_of_a_task_does_not_depend_on_other_tasks(tiny_model, tiny_saes, two_tasks, tmp_path):
    """The texts of the tasks overlap: a token may be drawn for one task and not for the other."""
    larger = write_csv(tmp_path / "larger.csv", people(600))
    asked = {"model": tiny_model, "saes": str(tiny_saes), "device": "cpu", "layers": [1]}
    asked["settings"] = ds.Settings(folds=3, repeats=1, whole_tokens=800)
    figures = ["n_tokens", "n_tokens_all", "mse_whole", "mse_whole_se", "fvu_whole", "fvu_whole_se", "dead", "dead_se"]

    def of(tasks):
        frame = ds.evaluate(**asked, tasks=tasks).to_frame().drop_duplicates("dataset")
        return frame.set_index("dataset")[figures]

    alone, other, both = of([two_tasks]), of([larger]), of([two_tasks, larger])
    separate = np.concatenate([alone, other])
    np.testing.assert_allclose(both.drop(columns="fvu_whole_se"), np.delete(separate, 5, axis=1), rtol=1e-6)
    np.testing.assert_allclose(
        both["fvu_whole_se"], separate[:, 5], rtol=0.2
    )  # of `dead`, about the mean of other texts, of which there are few here
    assert ((both["n_tokens"] > 700) & (both["n_tokens"] < 900)).all()
    assert (both["n_tokens"] < 0.6 * both["n_tokens_all"]).all()
    assert (both[["mse_whole_se", "fvu_whole_se"]] > 0).all(axis=None)


def test_a_token_sample_depends_only_on_the_seed(tiny_model, tiny_saes, sparser, two_tasks):
    settings = ds.Settings(folds=3, repeats=1, whole_tokens=500)
    one, again = (
        ds.Evaluator(tiny_model, 1, two_tasks, settings=settings, device="cpu", whole_tokens=settings.whole_tokens)
        for _ in range(2)
    )
    assert one(tiny_saes) == again(tiny_saes)
    assert one(sparser)["two/n_tokens"] == one(tiny_saes)["two/n_tokens"]
    other = ds.Settings(folds=3, repeats=1, whole_tokens=500, seed=1)
    found = ds.Evaluator(tiny_model, 1, two_tasks, settings=other, device="cpu", whole_tokens=500)(tiny_saes)
    assert found["two/mse_whole"] != one(tiny_saes)["two/mse_whole"]


def test_a_token_sample_has_the_requested_number_of_counted_tokens(tiny_model, two_tasks):
    """BOS does not count: it was counted when the share was chosen, a sixth of the tokens of a short text."""
    sizes = []
    for seed in range(20):
        settings = ds.Settings(folds=3, repeats=1, seed=seed)
        evaluator = ds.Evaluator(tiny_model, 1, two_tasks, whole_tokens=300, settings=settings, device="cpu")
        sizes.append(evaluator(TopK())["two/n_tokens"])
    assert 290 < np.mean(sizes) < 320


def test_a_too_large_token_sample_has_all_tokens(tiny_model, tiny_saes, two_tasks, evaluator):
    settings = ds.Settings(folds=3, repeats=2, whole_tokens=10**9)
    assert ds.Evaluator(tiny_model, 1, two_tasks, settings=settings, device="cpu", whole_tokens=settings.whole_tokens)(
        tiny_saes
    ) == evaluator(tiny_saes)


# --- the package


def test_the_import_is_fast_and_light():
    code = "import sys, time; t = time.perf_counter(); import delta_selectivity; print(time.perf_counter() - t); "
    code += "print([name for name in ('torch', 'numpy', 'transformers', 'pandas') if name in sys.modules])"
    told = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(done.stdout.split()[0]) for done in told) < 0.2
    assert told[0].stdout.splitlines()[1] == "[]"


def test_every_public_name_is_there_and_documented():
    for name in ds.__all__:
        found = getattr(ds, name)
        assert found.__doc__, name
    assert set(ds.__all__) <= set(dir(ds))
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))["project"]
    assert ds.__version__ == project["version"], "that of this clone, installed or not"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ds.nothing


def test_probe_selectivity_of_an_identity_is_exactly_zero():
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 6)).astype(np.float32)
    labels = x[:, 0] + random.normal(size=300) > 0
    found = ds.probe_selectivity(x, x, labels, np.arange(300), settings=FAST)
    assert isinstance(found, ProbeResult)
    assert found.delta_sel == found.transfer_delta == 0
    assert found.model_sel > 0.6
    assert asdict(found)["n_people"] == 300
