"""An interrupted and resumed run leaves the same bytes as an undisturbed one, except for the timings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import people, write_csv, write_sparsify
from injector import POINTS, Injector, fault
from runs import Request, files, left_over, numbers, scores_of, substance, without_q
from safetensors.torch import load_file, save_file

from delta_selectivity.records import result_file


@pytest.fixture
def ask(tiny_model, tiny_saes, tmp_path):
    """Return a request with two SAEs, the second without the last layer, and two datasets without common texts."""
    data = write_csv(tmp_path / "women.csv", people(80))
    sparser = write_sparsify(tmp_path / "sae-sparser", layers=[0, 1], k=2)
    flags = ("--folds", "3", "--repeats", "1", "--datasets", "politics", "--shuffle_select_n", "60")
    return Request(tiny_model, (tiny_saes, sparser), data, tmp_path / "undisturbed", flags)


def stop_at_write(request, n):
    """Run until the n-th write of a result file, which fails."""
    injector = Injector(POINTS["replace"][2], n)
    with fault("replace", injector):
        assert request.run() == 1


def test_interruption_at_any_write_and_resumption_give_the_same_bytes(ask, tmp_path, monkeypatch):
    written = []
    replace = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, target: written.append(Path(target).name) or replace(self, target))
        assert ask.run() == 0
    layers = [name.endswith(".json") for name in written][:-4]  # 2 datasets x (3 + 2) layers, and 4 files at the end
    assert sum(layers) == 10
    undisturbed = substance(ask.out)
    assert len(undisturbed) == 4
    assert any(json.loads(text)["_run"]["warnings"] for text in undisturbed.values()), "few people: warned of"
    assert all(json.loads(text)["_run"]["complete"] for text in undisturbed.values())
    for n in (3, 4, 14, len(layers) + 2):
        again = ask.into(tmp_path / str(n))
        stop_at_write(again, n)
        kept = {path: result_file.read(path) for path in files(again.out)}
        finished = {path: path.read_bytes() for path, found in kept.items() if found["_run"]["complete"]}
        assert sum(len(found) - 1 for found in kept.values()) == sum(layers[: n - 1])
        assert len(finished) == max(0, n - 1 - len(layers))
        assert again.run() == 0
        assert substance(again.out) == undisturbed
        assert scores_of(again.out) == scores_of(ask.out)
        assert all(path.read_bytes() == content for path, content in finished.items()), "finished files are untouched"
        assert left_over(again.out) == []


def test_a_run_may_be_interrupted_repeatedly(ask, tmp_path):
    assert ask.run() == 0
    again = ask.into(tmp_path / "again")
    for _ in range(2):
        stop_at_write(again, 8)
    assert again.run() == 0
    assert substance(again.out) == substance(ask.out)


def test_only_missing_layers_are_measured(ask, tmp_path):
    one = Request(ask.model, ask.saes, ask.data, tmp_path / "one", ("--folds", "3", "--repeats", "1"))
    assert one.plus("--layers", "1").run() == 0
    first = numbers(one.out)
    counted = Injector(RuntimeError, n=None)
    with fault("fit", counted):
        assert one.plus("--layers", "0,1").run() == 0
    assert counted.calls == 4, "layer 0: the model's view, its control task, and the view of two SAEs"
    assert one.into(tmp_path / "two").plus("--layers", "0,1").run() == 0
    assert numbers(one.out) == numbers(tmp_path / "two")
    for path, layers in first.items():
        assert without_q(layers) == without_q({"layer_1": numbers(one.out)[path]["layer_1"]})


def test_every_file_is_complete_if_one_sae_has_fewer_layers(ask):
    assert ask.run() == 0
    for path in files(ask.out):
        assert result_file.read(path)["_run"]["complete"] is True


def test_a_smaller_request_than_the_interrupted_one_is_complete(ask, tmp_path):
    one = Request(ask.model, ask.saes[:1], ask.data, tmp_path / "one", ("--folds", "3", "--repeats", "1"))
    stop_at_write(one, 3)  # scores and results of layer 0 are there
    (path,) = files(one.out)
    assert result_file.read(path)["_run"]["complete"] is False
    less = one.plus("--layers", "0")
    assert less.run() == 0
    assert result_file.read(path)["_run"]["complete"] is True
    assert less.into(tmp_path / "less").run() == 0
    assert substance(one.out) == substance(tmp_path / "less")
    content = path.read_bytes()
    assert less.run() == 0
    assert path.read_bytes() == content, "once complete it is left alone"


def change_csv(request, folder):
    rows = people(80)
    rows[7]["label"] = 1 - rows[7]["label"]
    return Request(request.model, request.saes, write_csv(folder / "women.csv", rows), request.out, request.more)


def change_tensor(path, name):
    weights = load_file(str(path))
    weights[name].view(-1)[5] += 1e-3
    save_file(weights, str(path), metadata={"format": "pt"})


def change_model(request, folder):
    model = shutil.copytree(request.model, folder / "pythia-tiny")
    change_tensor(model / "model.safetensors", "gpt_neox.embed_in.weight")
    return Request(model, request.saes, request.data, request.out, request.more)


def change_tokenizer(request, folder):
    model = shutil.copytree(request.model, folder / "pythia-tiny")
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    return Request(model, request.saes, request.data, request.out, request.more)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (change_csv, "--dataset_file"),
        (change_model, "--model_name"),
        (change_tokenizer, "--model_name"),
        (lambda request, folder: request.plus("--seed", "3"), "--seed 0 there, 3 now"),
        (lambda request, folder: request.plus("--folds", "4"), "--folds 3 there, 4 now"),
        (lambda request, folder: request.plus("--positions", "mean"), "--positions last there, mean now"),
        (lambda request, folder: request.plus("--shuffle_select_n", "80"), "--shuffle_select_n 60 there, 80 now"),
    ],
    ids=["csv", "model", "tokenizer", "seed", "folds", "positions", "rows"],
)
def test_changes_that_affect_numbers_are_detected(ask, tmp_path, capsys, change, word):
    assert ask.plus("--layers", "0").run() == 0
    before = {path: path.read_bytes() for path in files(ask.out)}
    (tmp_path / "changed").mkdir()
    capsys.readouterr()
    assert change(ask, tmp_path / "changed").run() == 2
    told = capsys.readouterr().err
    assert word in told
    assert "--overwrite" in told
    assert {path: path.read_bytes() for path in files(ask.out)} == before


@pytest.mark.parametrize("part", ["weights", "config"])
def test_changed_files_of_an_sae_are_detected(ask, tmp_path, capsys, part):
    sae = shutil.copytree(ask.saes[0], tmp_path / "mine")
    asked = Request(ask.model, (sae, ask.saes[1]), ask.data, ask.out, ask.more).plus("--layers", "0")
    assert asked.run() == 0
    before = {path: path.read_bytes() for path in files(ask.out)}
    if part == "weights":
        change_tensor(sae / "layers.2" / "sae.safetensors", "W_dec")
    else:
        path = sae / "layers.0" / "cfg.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "k": 7}))
    capsys.readouterr()
    assert asked.run() == 2
    told = capsys.readouterr().err
    assert f"weights or config of the SAE {sae} have changed since" in told
    assert "--overwrite" in told
    assert {path: path.read_bytes() for path in files(ask.out)} == before


@pytest.mark.parametrize("flags", [("--batch_size", "5"), ("--queue_gb", "0.5"), ("--verbose",)], ids=lambda f: f[0])
def test_changes_that_affect_no_number_resume(ask, flags):
    stop_at_write(ask, 3)
    assert ask.plus(*flags).run() == 0
