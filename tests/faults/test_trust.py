"""Untrusted files run no code, and untrusted names stay inside the results folder."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import people, write_csv
from runs import Request, files, numbers

from delta_selectivity.reporting import results, tables


@pytest.fixture
def ask(tiny_model, tiny_saes, tmp_path):
    data = write_csv(tmp_path / "women.csv", people(60))
    return Request(tiny_model, (tiny_saes,), data, tmp_path / "out").plus("--layers", "0")


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def copy_of(ask, tmp_path, name="pythia-tiny"):
    model = shutil.copytree(ask.model, tmp_path / "stranger" / name)
    return model, Request(model, ask.saes, ask.data, ask.out, ask.more)


def one_error(capsys):
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "failed: "))]
    return told


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_pickled_weights_run_no_code(ask, tmp_path, capsys, write):
    model, stranger = copy_of(ask, tmp_path)
    (model / "model.safetensors").unlink()
    mark = tmp_path / "executed"
    write({"gpt_neox.embed_in.weight": Payload(mark)}, model / "pytorch_model.bin")
    assert stranger.run() == 2
    assert "weights cannot be read" in one_error(capsys)
    assert not mark.exists()


def test_the_payload_works_when_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_code_of_a_model_is_neither_run_nor_prompted_for(ask, tmp_path, what):
    model, stranger = copy_of(ask, tmp_path)
    mark = tmp_path / "executed"
    (model / "theirs.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Theirs: pass\n")
    path = model / {"config": "config.json", "tokenizer": "tokenizer_config.json"}[what]
    content = json.loads(path.read_text())
    if what == "config":
        content |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs", "AutoModel": "theirs.Theirs"}}
    else:
        content |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
    path.write_text(json.dumps(content))
    with stranger.start(stdin=subprocess.PIPE) as process:
        shown, told = process.communicate("y\n" * 9, timeout=120)
    assert not mark.exists()
    assert "[y/N]" not in shown + told
    if process.returncode != 0:  # with a class of its own instead of the standard one, which is not needed
        assert process.returncode == 2
        assert told.startswith("error: --model_name")


HOSTILE = [". .", "-rf", "a\x1b[2J\u202eb\nc", "日本語", "%2e%2e%2f", "CON", "x" * 200, "~root", "$(id)",
           "__proto__", "<img src=x onerror=alert(1)>", "=1+1", "NUL.json"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_folders_and_files_stay_inside_the_results_folder(ask, tmp_path, capsys, name):
    model = shutil.copytree(ask.model, tmp_path / "model" / name)
    saes = tuple(shutil.copytree(ask.saes[0], tmp_path / which / name / which) for which in ("one", "two"))
    data = write_csv(tmp_path / f"{name}.csv", people(60))
    before = {path for path in tmp_path.rglob("*") if ask.out not in path.parents}
    assert Request(model, saes, data, ask.out, ask.more).run() == 0
    assert {path for path in tmp_path.rglob("*") if ask.out not in path.parents} - before == {ask.out}
    assert len(files(ask.out)) == 2
    for path in ask.out.rglob("*"):
        assert re.fullmatch(r"\w[\w.-]*", path.name)
        assert len(path.name) <= 255
    assert all(set(layers) == {"layer_0"} for layers in numbers(ask.out).values())
    table = tables.render(results.load(files(ask.out)))
    shown = capsys.readouterr()
    for text in (table, shown.out, shown.err):
        assert text.replace("\n", "").isprintable(), "a terminal would take it for a command"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..", "/", "/etc", "a/../../b", "x" * 5000, "\u202e/x", "a\x00b", "~"]
)
@pytest.mark.parametrize("flag", ["--model_name", "--sae_name", "--dataset_file"])
def test_a_name_that_leads_outside_is_rejected_with_one_line(ask, capsys, flag, name):
    assert ask.plus(flag, name).run() == 2
    told = one_error(capsys)
    assert told.startswith("error: ")
    assert told.isprintable()
    assert files(ask.out) == []
