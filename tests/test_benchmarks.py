"""The speed benchmarks run on tiny sizes, their references compute what they claim, and their arithmetic is right."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from benchmarks import (
    bench_end_to_end,
    bench_gpu,
    bench_scaling,
    bench_suite,
    independent,
    large_job,
    serial,
    timing,
    what_is_lost,
)
from benchmarks.bundled import MODEL
from benchmarks.shapes import SHAPES, TINY
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.reporting import results as report_files
from delta_selectivity.saes import open_sae
from delta_selectivity.tasks import Mention, load_probe_texts, tokenise
from delta_selectivity.tasks.wikidata import _FILES, load_wikidata

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("bench_forward.py", ("--repeats", "1")),
        ("bench_kernels.py", ("--repeats", "1")),
        pytest.param("bench_scaling.py", (), marks=pytest.mark.slow),
        pytest.param("bench_cache.py", (), marks=pytest.mark.slow),
        pytest.param("bench_demo.py", ("--repeats", "1"), marks=pytest.mark.slow),
        pytest.param("bench_dtype.py", ("--repeats", "1"), marks=pytest.mark.slow),
        pytest.param("bench_whole_tokens.py", ("--repeats", "1"), marks=pytest.mark.slow),
        pytest.param("bench_whole_tokens.py", ("--coverage",), marks=pytest.mark.slow),
        ("bench_scaling.py", ("--large", "--rows", "2000", "--layers", "1")),
    ],
)
def test_benchmarks_run_and_print_a_table(script: str, flags: tuple[str, ...]):
    done = run(script, "--quick", *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith("|") for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_cuda_device_a_line_and_exit_2():
    done = run("bench_gpu.py", "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_whole_job_of_the_gpu_benchmark_on_the_cpu():
    flags = ["--shuffle_select_n", "60", "--datasets", "gender", "--folds", "3", "--repeats", "1", "--device1", "cpu"]
    table = bench_gpu.whole_jobs(TINY, {"all": [*flags, "--whole_tokens", "all"], "sample": flags})
    assert {"forward", "sae", "probes", "from start to end"} <= {row[0] for row in table}
    assert table[0] == ("stage", "all", "sample", "matrix products of all tokens, TFLOP")
    assert all(len(row) == 4 for row in table)


def test_the_gpu_benchmark_runs_every_way_that_the_machine_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list(bench_gpu.settings()) == ["one card, all tokens, torch", "one card, torch"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(bench_gpu, "find_spec", lambda name: name)
    assert bench_gpu.settings()["two cards, cuml"] == ["--device1", "cuda:0", "--device2", "cuda:1", "--probe", "cuml"]
    assert len(bench_gpu.settings()) == 6


def test_sides_are_run_in_turn_after_a_warm_up():
    calls: list[str] = []
    seconds = timing.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_that_power(power: float):
    sizes = [1, 2, 4, 8]
    assert timing.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_kept_results_are_loaded_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "KEPT", tmp_path)
    rows = [("what", "seconds"), ("naïve | plain", "1.0")]
    timing.keep("some", rows)
    with monkeypatch.context() as other:
        other.setattr(timing, "machine", lambda: "another machine")
        timing.keep("some", [*rows, ("more", "2.0")])
    timing.keep("some", rows)
    assert timing.kept("some") == {timing.machine(): rows, "another machine": [*rows, ("more", "2.0")]}


@pytest.mark.parametrize("shape", [TINY, SHAPES[0]])
def test_flops_of_a_shape_are_those_of_its_weights(shape):
    with shape.model_folder() as folder:
        sites = [Site(layer, "resid_post") for layer in range(shape.n_layers)]
        module = open_model(str(folder)).load(sites, "cpu", "bfloat16").module
    weights = [each.weight.numel() for each in module.modules() if isinstance(each, nn.Linear)]
    assert shape.model_flops == 2 * sum(weights)


def test_random_saes_on_disk_are_those_in_memory(tmp_path: Path):
    TINY.write_saes(tmp_path / "saes")
    x = torch.randn(5, TINY.d, generator=torch.Generator().manual_seed(0))
    loaded, made = open_sae(str(tmp_path / "saes")).load(1, "cpu"), TINY.sae(1)
    torch.testing.assert_close(loaded.decode(loaded.encode(x)), made.decode(made.encode(x)))


def test_doublings_change_one_quantity_and_double_it():
    for doubling in bench_scaling.doublings(quick=False):
        for size, job in doubling.jobs():
            assert {**vars(doubling.base), doubling.quantity: size} == vars(job)
        assert all(b == 2 * a for a, b in zip(doubling.sizes, doubling.sizes[1:], strict=False))


def test_a_job_larger_than_its_memory_spills(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(large_job, "MAX_BYTES", 1000)
    found = large_job.run(n_rows=600, n_layers=2, width=8)
    assert found.stored_gb == pytest.approx(2 * 2 * 600 * 8 * 4 / 1024**3)
    assert 0 < found.peak_gb < 8


def test_the_serial_version_sees_the_activations_and_reconstructions_of_the_program():
    texts = ["Ada Lovelace met Charles Babbage", "Marie Curie", "a much longer text about Emmy Noether"]
    x = serial.last_tokens(MODEL, texts, layer=3)
    ours = torch.stack([alone(text, layer=3) for text in texts])
    torch.testing.assert_close(x, ours, rtol=1e-4, atol=1e-4)
    sae = open_sae(str(bench_end_to_end.SAE)).load(3, "cpu")
    recon = serial.reconstructions(*bench_end_to_end._weights(3), x)
    torch.testing.assert_close(recon, sae.decode(sae.encode(x)), rtol=1e-4, atol=1e-4)


def alone(text: str, layer: int) -> torch.Tensor:
    info = open_model(str(MODEL))
    mention = Mention(text, 0, len(text), "somebody")
    ids = tokenise([mention], info.tokenizer, prepend_bos=True, max_length=info.max_length).ids[0]
    site = Site(layer, "resid_post")
    found = info.load([site], "cpu", "float32").activations(torch.tensor(np.array([ids]), dtype=torch.int64))
    return found[site][0, -1]


def test_the_serial_version_finds_a_concept_and_no_other():
    random = np.random.default_rng(0)
    labels = random.random(400) < 0.3
    persons = np.arange(400) // 2
    x = random.normal(size=(400, 10)).astype(np.float32)
    assert abs(serial.selectivity(x, x, labels, persons) - 0.5) < 0.08
    x[:, 3] += 3 * labels
    assert serial.selectivity(x, x, labels, persons) > 0.85


def test_rows_of_the_timed_task_are_used_as_shipped():
    shipped = {
        stem: len(row_set.rows)
        for name, files in _FILES.items()
        for stem, row_set in zip(files, load_wikidata(name).row_sets, strict=True)
    }
    assert {stem: shipped[stem] for stem in bench_end_to_end.ROWS} == bench_end_to_end.ROWS


def test_parts_are_scaled_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Hooks with 1 .. 6 s of forward passes on one task and 10 s of probes each; the total is computed by hand."""

    def drive(command: list[str], layers: list[int], tasks: list[str], *flags: str) -> dict[str, dict[str, float]]:
        if "--at_its_best" in flags:
            return {"forward": {"all": 6.0}, "probes": {}}
        return {"forward": {str(n): n + 1.0 for n in layers}, "probes": {str(n): 10.0 for n in layers}}

    monkeypatch.setattr(bench_end_to_end, "run_driver", drive)
    monkeypatch.setattr(bench_end_to_end, "make_environment", lambda folder: folder)
    each, together = bench_end_to_end.time_package(tmp_path, whole=False, cpu_time=True)
    rows = sum(bench_end_to_end.ROWS.values()) / bench_end_to_end.ROWS[bench_end_to_end.TASK]
    assert each.forward == pytest.approx(sum(range(1, 7)) * rows)
    assert together.forward == pytest.approx(6 * rows)
    assert each.probes == together.probes == pytest.approx(10 * 6 * 9)


def test_the_suite_beside_its_package_is_scaled_up_by_characters_and_tasks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The first of three tasks is timed: 12 s of passes on 30 of 90 characters, 6 s of probes."""
    seconds = {"forward": {"0": 4.0, "1": 8.0}, "probes": {"0": 1.0, "1": 5.0}}
    monkeypatch.setattr(bench_suite, "run_driver", lambda *_: seconds)
    drawn = bench_suite.Drawn(["a", "b", "c"], {"a": 30, "b": 50, "c": 10})
    assert bench_suite.time_package(Path("python"), tmp_path, ["a"], drawn) == (36.0, 18.0)


def test_the_rows_beside_which_the_suite_is_timed_are_those_that_a_run_draws(tmp_path: Path):
    drawn = bench_suite.draw_rows("87_glue_cola", tmp_path / "rows.csv")
    texts = [
        mention.text for mention in load_probe_texts(("87_glue_cola",), shuffle_select_n=bench_suite.ROWS).mentions
    ]
    assert drawn == (["87_glue_cola"], {"87_glue_cola": sum(map(len, texts))})


def test_the_table_of_the_whole_job_has_the_medians_of_its_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Cost = bench_end_to_end.Cost
    ours = iter([4.0, 100.0, 5.0])
    monkeypatch.setattr(bench_end_to_end, "time_ours", lambda _: Cost("ours", "whole", None, None, next(ours)))
    theirs = iter([Cost("theirs", "a part", *seconds) for seconds in ((1, 2, 3), (30, 20, 50), (7, 1, 8))])
    monkeypatch.setattr(bench_end_to_end, "time_package", lambda *_: [next(theirs)])
    monkeypatch.setattr(bench_end_to_end, "time_serial", lambda _: Cost("serial", "a part", 9.0, 1.0, 10.0))
    _, *rows = bench_end_to_end.measure(tmp_path, whole=False, cpu_time=False, repeats=3)
    assert rows == [
        ("ours", "whole", "", "", "5", "1.0x"),
        ("theirs", "a part", "7", "2", "8", "1.6x"),
        ("serial", "a part", "9", "1", "10", "2.0x"),
    ]


def test_the_independent_loop_agrees_and_reports_disagreements(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    labels = np.repeat(random.random(80) < 0.5, 2)
    x = (random.normal(size=(160, 6)) + labels[:, None]).astype(np.float32)
    content = {
        "x": x,
        "recon.good": x + random.normal(size=x.shape).astype(np.float32),
        "labels.known": labels.astype(np.int8),
        "labels.of_some": np.where(np.arange(160) < 120, ~labels, -1).astype(np.int8),
        "groups": np.repeat(np.arange(80), 2),
    }
    save_file(content, tmp_path / "rows.safetensors")
    found = independent.compare(tmp_path / "rows.safetensors", repeats=1)
    assert [(each.probe, each.figure) for each in found] == [
        (probe, figure) for probe in ("known", "of_some") for figure in ("model_sel", "sae_sel")
    ]
    assert max(abs(each.difference) for each in found) < independent.ALLOWED
    assert min(each.program for each in found) > 0.65
    monkeypatch.setattr(independent.serial, "selectivity", lambda *_: 0.5)
    monkeypatch.setattr(sys, "argv", ["independent", str(tmp_path / "rows.safetensors"), "--repeats", "1"])
    assert independent.main() == 1
    assert "| known | good | model_sel |" in capsys.readouterr().out


def test_tables_of_losses_have_the_numbers_of_the_files():
    lines = report_files.lines(report_files.load(report_files.result_files(ROOT / "results" / "demo")))
    head, *rows = what_is_lost.concepts(lines)
    record = json.loads((ROOT / "results/demo/tiny-pythia-saes-k8/tiny-pythia_wikidata_gender.json").read_text())
    cell = record["layer_3"]["gender"]
    (row,) = (row for row in rows if row[:2] == ["3", "gender"])
    assert row[2] == f"{cell['model_sel']:.3f}"
    assert row[head.index("survives, tiny-pythia-saes-k8 (delta_sel)")].startswith(f"{cell['transfer_r2']:.3f} (")
    means = [statistics.fmean(float(text.split()[0]) for text in row[3:]) for row in rows if row[0] == "3"]
    assert means == sorted(means)
    by_sae = {(row[0], row[1]): row for row in what_is_lost.saes(lines)[1:]}
    known = [
        line["transfer_r2"]
        for line in lines
        if line["layer"] == 3 and "k32" in line["sae"] and line["model_sel"] > what_is_lost.KNOWN
    ]
    assert by_sae["3", "tiny-pythia-saes-k32"][6:8] == [str(len(known)), f"{statistics.fmean(known):.3f}"]
