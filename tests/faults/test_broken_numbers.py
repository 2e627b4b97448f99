"""NaN and Inf: the error says where, and finished results are kept."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import people, write_csv
from runs import Request, numbers

from delta_selectivity.models.language_model import LanguageModel
from delta_selectivity.run.row_store import RowStore
from delta_selectivity.saes import Sae
from delta_selectivity.saes.selection import Gated, Threshold

MARK = "Zebedee"  # the texts with this name produce broken numbers


@pytest.fixture
def ask(tiny_model, tiny_saes, tmp_path):
    """Return a request on a task in a file, one of whose texts will produce broken numbers."""
    rows = people(60)
    rows[30] = {**rows[30], "text": f"{MARK} {'very ' * 30}long {rows[30]['group']}", "start": "", "end": ""}
    data = write_csv(tmp_path / "women.csv", rows)
    return Request(tiny_model, (tiny_saes,), data, tmp_path / "out")


def breaking(method, where, value):
    """Return `method` with `value` written to its result at row or text `where`."""

    def broken(self, given, *more):
        found = method(self, given, *more)
        with torch.inference_mode():  # the place where the activations were computed
            return where(self, given, found, value)

    return broken


def breaking_activations(where, value):
    """Return `LanguageModel.activations` with `value` written to its result at text `where`."""
    broken = breaking(LanguageModel.activations, where, value)

    def of_tokens(self, ids, tokens=None):
        found = broken(self, ids)
        return found if tokens is None else {site: x.flatten(0, 1)[tokens] for site, x in found.items()}

    return of_tokens


def break_layer_1(self, ids, found, value):
    """Break the last token of the longest text, at layer 1."""
    if ids.shape[1] > 30:  # a forward pass with that text
        site = next(site for site in found if site.layer == 1)
        found[site][0, ids.shape[1] - 1, 3] = value
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_activation_is_named_with_layer_and_text(ask, monkeypatch, capsys, value):
    monkeypatch.setattr(LanguageModel, "activations", breaking_activations(break_layer_1, value))
    assert ask.run() == 1
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert "layer 1" in told
    assert "activations" in told
    assert MARK in told
    assert len(told) < 400
    assert numbers(ask.out) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_a_code_or_reconstruction_is_named_with_layer_sae_and_text(ask, monkeypatch, capsys, value, part):
    def break_it(self, given, found, value):
        if self.layer == 2:
            (found.value if part == "encode" else found)[0] = value
        return found

    monkeypatch.setattr(Sae, part, breaking(getattr(Sae, part), break_it, value))
    assert ask.run() == 1
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert "layer 2" in told
    assert "sae-tiny" in told
    assert MARK in told


def test_broken_values_are_detected_at_any_token(ask, monkeypatch, capsys):
    """Check tokens that no probe reads: the figures over whole texts would be NaN."""

    def early_token(self, ids, found, value):
        for values in found.values() if ids.shape[1] > 30 else ():
            values[0, 1, 0] = value
        return found

    monkeypatch.setattr(LanguageModel, "activations", breaking_activations(early_token, float("nan")))
    assert ask.run() == 1
    assert MARK in capsys.readouterr().err


@pytest.mark.parametrize("part", ["activations", "reconstruction"])
def test_broken_rows_from_a_gpu_are_detected_when_probed(ask, monkeypatch, capsys, part):
    """Rows are not checked when they arrive, because that would wait for the GPU."""
    put = RowStore.put

    def as_from_a_gpu(self, rows):
        with monkeypatch.context() as unseen:
            unseen.setattr(RowStore, "_check", lambda *_: None)
            put(self, rows)

    monkeypatch.setattr(RowStore, "put", as_from_a_gpu)
    if part == "activations":
        broken = breaking_activations(break_layer_1, float("nan"))
        monkeypatch.setattr(LanguageModel, "activations", broken)
    else:

        def break_it(self, given, found, value):
            if self.layer == 1:
                found[0] = value
            return found

        monkeypatch.setattr(Sae, "decode", breaking(Sae.decode, break_it, float("nan")))
    assert ask.run() == 1
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert "layer 1" in told and part in told and "of the text" in told
    assert all("layer_1" not in layers for layers in numbers(ask.out).values())


def test_datasets_finished_before_the_error_are_kept(ask, monkeypatch, capsys, tmp_path):
    """The bundled task comes first, the file with the broken text after it."""
    both = ask.plus("--datasets", "gender", "--shuffle_select_n", "60", "--layers", "1")
    seen = []

    def second_dataset(self, ids, found, value):
        if len(found) > 1:  # the preflight, which uses more sites than the requested one
            return found
        seen.append(len(ids))
        return break_layer_1(self, ids, found, value) if sum(seen) > 60 else found

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "activations", breaking_activations(second_dataset, float("nan")))
        assert both.run() == 1
    assert list(numbers(ask.out)) == ["pythia-tiny_wikidata_gender.json"]
    assert both.run() == 0
    assert both.into(tmp_path / "whole").run() == 0
    assert numbers(ask.out) == numbers(tmp_path / "whole")


def test_weights_that_are_not_finite_are_rejected(ask, tiny_saes, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_saes, tmp_path / "broken")
    path = broken / "layers.1" / "sae.safetensors"
    weights = load_file(str(path))
    weights["W_dec"][3, 4] = float("inf")
    save_file(weights, str(path))
    request = Request(ask.model, (broken,), ask.data, tmp_path / "out")
    assert request.run() == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert "layers.1" in told
    assert "W_dec" in told


@pytest.mark.parametrize(
    "selection", [Threshold(torch.zeros(4)), Gated(torch.ones(4), torch.zeros(4))], ids=["threshold", "gated"]
)
def test_a_nan_pre_activation_does_not_become_zero(selection):
    codes = selection(torch.tensor([[1.0, torch.nan, -1.0, 0.0]]))
    assert codes.col.tolist() == [0, 1]
    assert codes.value.isnan().tolist() == [False, True]


def test_unexpected_errors_show_the_traceback_and_expected_ones_only_with_verbose(ask, monkeypatch, capsys, caplog):
    failure: Exception = OSError(28, "No space left on device")

    def explode(self, ids, tokens):
        raise failure

    monkeypatch.setattr(LanguageModel, "activations", explode)
    assert ask.run() == 1
    assert "in explode" not in caplog.text
    assert ask.plus("--verbose").run() == 1
    assert "in explode" in caplog.text
    caplog.clear()
    failure = ZeroDivisionError("in the forward pass")
    assert ask.run() == 1
    assert "in explode" in caplog.text
    told = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("failed") for line in told) == 3
    assert all("the same command goes on from there" in line for line in told if line.startswith("failed"))
