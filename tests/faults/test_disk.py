"""Full disks, read-only folders and missing inputs: exit code 1 or 2, one line, intact results."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import people, write_csv
from runs import Request, left_over, numbers, substance, without_q

from delta_selectivity.models.language_model import LanguageModel, ModelInfo
from delta_selectivity.run import measure


@pytest.fixture
def ask(tiny_model, tiny_saes, tmp_path):
    return Request(tiny_model, (tiny_saes,), write_csv(tmp_path / "women.csv", people(80)), tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of a given number of KB in memory; unmount it afterwards."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a disk needs root and the right to mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=False)


def one_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if not line.startswith(("WARNING", "INFO"))]
    assert len(lines) == 1, text
    return lines[0]


def test_a_full_disk_keeps_finished_layers_and_the_run_resumes(ask, small_disk, tmp_path, capsys):
    assert ask.run() == 0
    undisturbed = substance(ask.out)
    disk = small_disk(200)
    full = ask.into(disk / "out")
    assert full.plus("--layers", "0").run() == 0
    before = (disk / "out" / "pythia-tiny_women.json").read_bytes()
    (disk / "ballast").write_bytes(b"0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    capsys.readouterr()
    assert full.run() in {1, 2}
    assert "No space left" in one_line(capsys.readouterr().err)
    assert (disk / "out" / "pythia-tiny_women.json").read_bytes() == before
    (disk / "ballast").unlink()
    assert full.run() == 0
    assert left_over(disk) == []
    assert numbers(full.out) == numbers(ask.out)
    assert substance(full.out).keys() == undisturbed.keys()


def test_a_disk_may_become_full_at_any_byte_of_a_run(ask, small_disk, capsys):
    """Allow one page more each time, until it is enough: finished results are whole, and a rerun completes them."""
    assert ask.run() == 0
    whole = numbers(ask.out)["pythia-tiny_women.json"]
    disk = small_disk(512)
    page = os.statvfs(disk).f_frsize
    finished = []
    for pages in range(100):
        full = ask.into(disk / "out")
        ballast = disk / "ballast"
        ballast.write_bytes(b"0" * (page * (os.statvfs(disk).f_bavail - pages)))
        capsys.readouterr()
        code = full.run()
        if code == 0:
            break
        assert code in {1, 2}
        assert "No space left" in one_line(capsys.readouterr().err)
        assert left_over(disk) == []
        found = numbers(full.out).get("pythia-tiny_women.json", {})
        assert without_q(found) == {layer: figures for layer, figures in without_q(whole).items() if layer in found}
        finished.append(len(found))
        ballast.unlink()
        if len(found) > max(finished[:-1], default=0):  # at each new layer only, because a run takes a second
            assert full.run() == 0
            assert substance(full.out) == substance(ask.out)
        shutil.rmtree(full.out, ignore_errors=True)
    assert {0, 1, 2} <= set(finished), "it filled before, between and after layers"


def test_a_disk_too_small_for_spilled_rows(ask, small_disk, monkeypatch, capsys):
    assert ask.plus("--layers", "0").run() == 0
    before = (ask.out / "pythia-tiny_women.json").read_bytes()
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk(16)))
    short = ask.plus("--queue_gb", "0.000001")
    assert short.run() == 1
    assert "No space left" in one_line(capsys.readouterr().err)
    assert (ask.out / "pythia-tiny_women.json").read_bytes() == before
    monkeypatch.undo()
    assert short.run() == 0


def test_a_limit_on_the_size_of_files(ask, tmp_path):
    """The kernel refuses to let a file grow, so a write fails in the middle."""
    assert ask.run() == 0
    size = (ask.out / "pythia-tiny_women.json").stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 900, size - 900))

    limited = ask.into(tmp_path / "limited")
    with limited.start(preexec_fn=limit) as process:
        _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "File too large" in one_line(told)
    assert left_over(limited.out) == []
    assert list(numbers(limited.out)["pythia-tiny_women.json"]) == ["layer_0", "layer_1"]
    assert limited.run() == 0
    assert substance(limited.out) == substance(ask.out)


def test_a_read_only_folder_is_rejected_before_loading(ask, small_disk, monkeypatch, capsys):
    disk = small_disk(64)
    if subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("remounting is not allowed here")
    monkeypatch.setattr(ModelInfo, "load", lambda *a: pytest.fail("the model was loaded"))
    assert ask.into(disk / "out").run() == 2
    assert "Read-only" in one_line(capsys.readouterr().err)
    assert ask.into(disk).run() == 2


def test_a_file_in_place_of_the_folder_is_rejected(ask, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert ask.into(out).run() == 2
        assert "cannot write" in one_line(capsys.readouterr().err)


def test_a_folder_that_becomes_read_only_during_the_run(ask, monkeypatch, capsys):
    """The error is simulated, because the kernel does not remount a disk with open files."""
    load, remove = ModelInfo.load, Path.unlink

    def read_only(path, *args, **kwargs):
        if path.name.startswith("."):
            raise OSError(30, "Read-only file system", str(path))
        return remove(path, *args, **kwargs)

    def load_on_read_only(*args):
        monkeypatch.setattr(Path, "replace", read_only)
        monkeypatch.setattr(Path, "unlink", read_only)
        return load(*args)

    monkeypatch.setattr(ModelInfo, "load", load_on_read_only)
    assert ask.run() == 1
    assert "Read-only" in one_line(capsys.readouterr().err)
    monkeypatch.undo()
    assert ask.run() == 0
    assert left_over(ask.out) == []


VANISHING = ["weights of the SAE", "config of the SAE", "folder of the SAE", "weights of the model",
             "folder of the model", "the task's file", "results folder"]  # fmt: skip


@pytest.mark.parametrize("what", VANISHING)
def test_an_input_removed_between_plan_and_run(ask, tmp_path, monkeypatch, capsys, what):
    model = shutil.copytree(ask.model, tmp_path / "gone" / "pythia-tiny")
    sae = shutil.copytree(ask.saes[0], tmp_path / "gone" / "sae-tiny")
    data = Path(shutil.copy(ask.data, tmp_path / "gone"))
    request = Request(model, (sae,), data, ask.out)
    assert request.plus("--layers", "0").run() == 0
    before = (ask.out / "pythia-tiny_women.json").read_bytes()
    load = measure.load_weights

    def vanish_then_load(*args):
        victim = {
            "weights of the SAE": sae / "layers.1" / "sae.safetensors",
            "config of the SAE": sae / "layers.1" / "cfg.json",
            "folder of the SAE": sae,
            "weights of the model": model / "model.safetensors",
            "folder of the model": model,
            "the task's file": data,
            "results folder": ask.out,
        }[what]
        if victim.exists():
            shutil.move(victim, tmp_path / "moved")
        return load(*args)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "load_weights", vanish_then_load)
        code = request.run()
    if what in {"config of the SAE", "the task's file"}:
        assert code == 0, "it was read already"
        return
    assert code in {1, 2}
    one_line(capsys.readouterr().err)
    kept = tmp_path / "moved" if what == "results folder" else ask.out
    assert (kept / "pythia-tiny_women.json").read_bytes() == before


@pytest.mark.parametrize("damage", [b"", None], ids=["cut off", "overwritten"])
def test_overwriting_weights_during_the_run_changes_nothing(ask, tmp_path, monkeypatch, damage):
    """Weights are memory-mapped: a later write must neither change numbers nor kill the process."""
    assert ask.run() == 0
    model = shutil.copytree(ask.model, tmp_path / "copy" / "pythia-tiny")
    sae = shutil.copytree(ask.saes[0], tmp_path / "copy" / "sae-tiny")
    forward, calls = LanguageModel.activations, []

    def write_then_run(self, ids, *tokens):
        if not calls:
            for path in (model / "model.safetensors", *sae.glob("*/sae.safetensors")):
                path.write_bytes(b"\x3f" * path.stat().st_size if damage is None else damage)
        calls.append(len(ids))
        return forward(self, ids, *tokens)

    monkeypatch.setattr(LanguageModel, "activations", write_then_run)
    again = Request(model, (sae,), ask.data, tmp_path / "again", ask.more)
    assert again.run() == 0
    assert numbers(again.out) == numbers(ask.out)
    assert calls
