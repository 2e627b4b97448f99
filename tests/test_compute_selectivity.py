"""Many workers: the same numbers as one process, for any failure of workers or merging."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import people, write_csv, write_sparsify
from runs import ROOT, Request, left_over, numbers, scores_of

from benchmarks import gemma_scope
from benchmarks.scale_simulation import Task, simulate
from delta_selectivity.cli import scale
from delta_selectivity.cli.command_line import parse
from delta_selectivity.errors import RequestError
from delta_selectivity.records import result_file
from delta_selectivity.records.sae_level import settle
from delta_selectivity.run.planning import make_plan, open_files
from delta_selectivity.scale import cluster, estimate, merge, spread, units, worker
from delta_selectivity.scale.bar import UnitsBar
from delta_selectivity.scale.estimate import Shape
from delta_selectivity.scale.same_program import own_digest
from delta_selectivity.system.file_lock import exclusive
from delta_selectivity.tasks import data_wheel


@pytest.fixture(scope="module")
def sparser(tmp_path_factory) -> Path:
    """Create a second SAE, which has no layer 0."""
    return write_sparsify(tmp_path_factory.mktemp("saes") / "sae-sparser", layers=[1, 2], k=2)


@pytest.fixture(scope="module")
def request_(tiny_model, tiny_saes, sparser, tmp_path_factory) -> Request:
    """Return a request with two SAEs, two tasks and all baselines."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{**row, "task": task} for task in ("women", "others") for row in people(160, seed=len(task))]
    more = ("--folds", "3", "--repeats", "2", "--baselines", "all", "--positions", "mean", "--keep_texts", "all")
    return Request(tiny_model, (tiny_saes, sparser), write_csv(folder / "two.csv", rows), folder / "none", more)


@pytest.fixture(scope="module")
def alone(request_, tmp_path_factory) -> Path:
    """Return the results of main.py for the request."""
    out = tmp_path_factory.mktemp("alone")
    assert request_.into(out).run() == 0
    return out


def compute(asked: Request, *flags: str) -> int:
    return scale.main([*asked.argv, *flags])


def start(asked: Request, *flags: str, **options) -> subprocess.Popen[str]:
    """Start processes of their own, with one thread each."""
    command = [sys.executable, str(ROOT / "compute_selectivity.py"), *asked.argv, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


def assert_same(found: Path, expected: Path) -> None:
    assert numbers(found) == numbers(expected)
    assert scores_of(found) == scores_of(expected)
    for path in numbers(expected):
        one, other = (result_file.read(folder / path)["_run"] for folder in (found, expected))
        for name in ("key", "q_family", "sae_level", "complete", "results_sha256"):
            assert one[name] == other[name], (path, name)
        assert sorted(one["warnings"]) == sorted(other["warnings"])
    assert left_over(found) == []


def folders(out: Path) -> list[Path]:
    """Return the folders of units that are not merged yet."""
    return sorted((out / units.FOLDER).glob("layers_*"))


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the program ended: {process.stderr.read()}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the worker processes: all of Python's except its resource tracker."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if "spawn_main" in " ".join(child.cmdline())]


def measure_unit(unit, own_device):
    """Measure a unit as a worker does."""
    return worker.run_unit(unit, Path.cwd(), own_device, own_digest())


CUT = ("--layers_per_unit", "2", "--saes_per_unit", "1")  # (0,1) and (2) of the first SAE, (1) and (2) of the second


def test_two_processes_write_the_same_bytes_as_main(request_, alone, tmp_path, monkeypatch, caplog):
    asked = request_.into(tmp_path / "out")
    assert compute(asked, "--workers", "2", *CUT) == 0
    assert_same(asked.out, alone)
    kept = [{path.relative_to(folder): path.read_bytes() for path in folder.glob("**/texts.json.gz")}
            for folder in (asked.out, alone)]  # fmt: skip
    assert kept[0] == kept[1] != {}
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == len(set(lines)) > 0, "what units say comes here, each line once"
    before = {path: path.stat().st_mtime_ns for path in asked.out.glob("**/*.*")}
    monkeypatch.setattr(spread, "open_cluster", lambda *a: pytest.fail("workers were started"))
    assert compute(asked, "--workers", "2", *CUT) == 0
    assert {path: path.stat().st_mtime_ns for path in asked.out.glob("**/*.*")} == before


@pytest.fixture
def planned(request_, tmp_path):
    """Return the plan of the request, and its units for a way to split it."""
    plan = make_plan(parse(request_.into(tmp_path / "out").argv).request, fetch=False)
    return plan, lambda layers, saes: units.plan_units(plan, layers, saes)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("saes", [1, 2])
def test_units_cover_every_part_of_the_request_once(planned, layers, saes):
    plan, cut = planned
    found = [part for unit in cut(layers, saes) for part in unit.subjects]
    expected = [(i, site.layer) for i, subject in enumerate(plan.subjects) for site in subject.sites]
    assert sorted(found) == sorted(expected)
    for unit in cut(layers, saes):
        assert len(unit.layers) <= layers
        assert len(unit.request.saes) <= saes
        own = {(subject, layer) for subject, layer in unit.subjects if subject < len(plan.saes)}
        assert {layer for _, layer in own} == set(unit.layers)


def test_a_units_name_depends_only_on_what_it_measures(planned):
    plan, cut = planned
    names = [unit.id for unit in cut(1, 2)]
    assert len(set(names)) == len(names)
    settings = plan.request.settings
    how = {"output": Path("elsewhere"), "device2": "cuda:0", "settings": replace(settings, batch_size=3)}
    elsewhere = replace(plan, request=replace(plan.request, **how))
    assert [unit.id for unit in units.plan_units(elsewhere, 1, 2)] == names
    other = units.plan_units(with_seed(plan, 1), 1, 2)
    assert not {unit.id for unit in other} & set(names)


def with_seed(plan, seed):
    """Return the plan of the same request with another seed."""
    return replace(plan, request=replace(plan.request, settings=replace(plan.request.settings, seed=seed)))


def test_merging_can_be_interrupted_and_repeated(planned, alone, monkeypatch):
    """Each attempt gets one write further; a unit whose scores have been moved already does not stop it."""
    plan, cut = planned
    todo = cut(2, 1)
    for unit in todo:
        outcome = measure_unit(unit, own_device=False)
        assert outcome.status == "done", outcome
    calls = {"left": 0}

    def sometimes(function):
        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] < 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(result_file, "write_json", sometimes(result_file.write_json))
    monkeypatch.setattr(merge.os, "replace", sometimes(os.replace))
    for attempt in range(1, 200):
        calls["left"] = attempt % 3 + 1
        try:
            with ExitStack() as held:
                files = open_files(plan, held)
                for unit in todo:
                    merge.merge(unit.folder, files)
                calls["left"] = 1000
                settle(files)
                spread.clear(todo)
            break
        except KeyboardInterrupt:
            continue
    assert attempt > 5
    assert_same(plan.request.output, alone)


def test_stray_files_among_units_are_skipped_and_links_rejected(planned, request_, tmp_path, capsys):
    plan, cut = planned
    unit = cut(3, 2)[0]
    assert measure_unit(unit, own_device=False).status == "done"
    (unit.folder / "notes (copy).json").write_text("mine")
    with ExitStack() as held:
        opened = open_files(plan, held)
        merge.merge(unit.folder, opened)
        assert any(file.layers for file in opened.values())
    elsewhere = (plan.request.output / units.FOLDER).rename(tmp_path / "elsewhere")
    (plan.request.output / units.FOLDER).symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    assert compute(request_.into(plan.request.output), "--overwrite") == 2
    assert ".units is a symbolic link" in capsys.readouterr().err
    assert sorted(elsewhere.rglob("*")) == before


def test_results_of_another_request_are_not_merged(planned, request_):
    plan, cut = planned
    unit = cut(1, 1)[0]
    assert measure_unit(unit, own_device=False).status == "done"
    with ExitStack() as held, pytest.raises(RequestError, match="`seed` 0 there, 3 now"):
        merge.merge(unit.folder, open_files(with_seed(plan, 3), held))


@pytest.mark.slow
def test_main_and_many_workers_resume_each_other(request_, alone, tmp_path):
    first, second = request_.into(tmp_path / "first"), request_.into(tmp_path / "second")
    assert first.plus("--layers", "1").run() == 0
    assert compute(first, "--workers", "1", "--layers_per_unit", "2") == 0
    assert_same(first.out, alone)
    assert compute(second, "--workers", "1", "--layers", "1") == 0
    assert second.run() == 0
    assert_same(second.out, alone)


@pytest.mark.slow
def test_killing_a_worker_loses_no_unit_and_changes_no_number(request_, alone, tmp_path):
    asked = request_.into(tmp_path / "out")
    process = start(asked, "--workers", "2", *CUT)
    wait_for(lambda: any(list(folder.glob("**/*.json")) for folder in folders(asked.out)), process)
    victims = [child for child in workers_of(process) if child.cpu_times().user > 1]
    victims[0].kill()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert_same(asked.out, alone)


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_the_command_resumes(request_, alone, tmp_path):
    asked = request_.into(tmp_path / "out")
    process = start(asked, "--workers", "2", *CUT)
    wait_for(lambda: list(asked.out.glob("**/*.json")), process)
    below = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    said = [line for line in err.splitlines() if not line.startswith("WARNING: ")]
    assert len(said) == 1, err
    assert said[0].startswith("interrupted: ")
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive
    assert compute(asked, "--workers", "1", *CUT) == 0
    assert_same(asked.out, alone)


@pytest.mark.slow
def test_other_units_finish_after_a_failed_unit(planned, request_, alone, capsys):
    plan, cut = planned
    asked = request_.into(plan.request.output)
    blocked = cut(2, 1)[0].folder
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder belongs")
    assert compute(asked, "--workers", "1", *CUT) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("failed: UnitsFailed: 1 of 4 units; the first: FileExistsError")
    assert len(numbers(asked.out)) > 2, "the others' results are there"
    blocked.unlink()
    assert compute(asked, "--workers", "1", *CUT) == 0
    assert_same(asked.out, alone)


def test_an_invalid_request_found_by_a_worker_ends_the_run_with_one_line(request_, tiny_saes, tmp_path, capsys):
    broken = shutil.copytree(tiny_saes, tmp_path / "broken")
    (broken / "layers.1" / "sae.safetensors").write_bytes(b"nothing")
    asked = replace(request_.into(tmp_path / "out"), saes=(broken,))
    assert compute(asked, "--workers", "1") == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert "layers.1" in err[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--workers", "many"], "many"),
        (["--saes_per_unit", "0"], "--saes_per_unit"),
        (["--scheduler", "tcp://127.0.0.1:1", "--workers", "2"], "--workers 2"),
        (["--scheduler", "nonsense"], "nonsense"),
        (["--scheduler", "tls://127.0.0.1:1"], "--tls_ca_file is needed"),
        (["--tls_cert", "me.pem"], "--tls_cert is for --scheduler tls://"),
        (["--config", "/no/such.toml"], "/no/such.toml"),
        (["--layers", "9"], "--layers 9"),
        (["inspect"], "main.py"),
        (["--no_such_flag"], "no_such_flag"),
    ],
)
def test_a_wrong_request_is_one_line(request_, tmp_path, capsys, flags, words):
    asked = request_.into(tmp_path / "out")
    assert compute(asked, *flags) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert words in err[0]
    assert not list(asked.out.glob("**/*.json"))


def test_without_dask_one_line_says_what_to_install(request_, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    assert compute(request_.into(tmp_path / "out")) == 2
    assert "delta-selectivity[scale]" in capsys.readouterr().err


def test_workers_share_gpus_or_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert spread.count_workers(None, "cpu", 100) == (cores, 0)
    assert spread.count_workers(8, "cpu", 3) == (3, 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert spread.count_workers(None, "cuda:0", 100) == (4, 4)
    assert spread.count_workers(2, "cuda:0", 100) == (2, 2)
    with pytest.raises(RequestError, match="4 GPUs"):
        spread.count_workers(5, "cuda:0", 100)


def test_a_cluster_sets_its_threads_and_restores_the_environment(monkeypatch):
    monkeypatch.setattr(cluster, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    for n_workers, threads in ((1, "6"), (2, "3")):
        with cluster.open_cluster(n_workers, 0, None) as client:
            client.wait_for_workers(n_workers)
            assert [*client.run(os.getenv, "OMP_NUM_THREADS").values()] == [threads] * n_workers
        assert dict(os.environ) == before


def test_each_worker_is_pinned_to_a_gpu_that_this_process_may_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [cluster._pinned(name)["CUDA_VISIBLE_DEVICES"] for name in (0, 1)] == ["2", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert cluster._pinned(1) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_the_plan_prints_every_unit_and_runs_nothing(request_, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("delta_selectivity.scale.spread.open_files", lambda *a: pytest.fail("it began"))
    asked = request_.into(tmp_path / "out")
    assert compute(asked, "--plan", *CUT) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n| ") == 4
    assert "4 units" in shown


def test_an_estimate_grows_with_what_is_asked():
    one = Shape(tokens=1000, rows=10, cells=100, d_model=8, n_layers=2, n_sites=1, sae_sizes=((8, 64, 8),),
                dtype_bytes=2, vocabulary=50)  # fmt: skip
    cost = estimate.cost(one, estimate.CPU_CORE)
    assert cost.sae_bytes == 4 * 2 * 8 * 64
    assert cost.row_bytes == 4 * 10 * (8 + 8)
    assert cost.model_bytes == 2 * (2 * 12 * 64 + 50 * 8)
    deeper, wider = replace(one, n_layers=3), replace(one, sae_sizes=((8, 64, 8), (8, 128, 8)))
    assert estimate.cost(deeper, estimate.CPU_CORE).seconds > cost.seconds
    assert estimate.cost(wider, estimate.CPU_CORE).seconds > cost.seconds


def recipes() -> list[str]:
    """Return the cluster commands of docs/scale.md: openssl, scheduler, worker, client, and the Slurm job."""
    text = (ROOT / "docs" / "scale.md").read_text("utf-8")
    found = re.findall(r"```bash\n(.*?)```", text[text.index("**Clusters.**") : text.index("## Sweeps")], re.DOTALL)
    assert len(found) == 5
    return found


@pytest.fixture
def shell(tmp_path, request_):
    """Start a command of the page in a folder of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "SLURM_JOB_ID": "7"}
    env |= {"PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{env['PATH']}"}
    env["DELTA_SELECTIVITY_DATA"] = str(data_wheel.fetch().parent)  # which is below the other HOME
    port, shared = free_port(), tmp_path / "shared" / "keys"
    shared.mkdir(parents=True)

    def start(command: str, where: str, *flags: str) -> subprocess.Popen[str]:
        (tmp_path / where).mkdir(exist_ok=True)
        command = command.replace("/shared/keys", str(shared)).replace("HOST", "127.0.0.1").replace("8786", str(port))
        words = ["bash", "-c", command, "bash", *flags]
        return subprocess.Popen(words, env=env, cwd=tmp_path / where, stderr=subprocess.PIPE, text=True)

    return start


@pytest.mark.slow
def test_the_commands_of_the_scale_page_start_a_cluster(shell, alone, request_, tmp_path):
    """Scheduler, worker and client each run in a folder of their own without files of the program."""
    make_keys, *servers, client, _ = recipes()
    assert shell(make_keys, "keys").wait(timeout=60) == 0
    others = [shell(f"exec env {command}", where) for where, command in zip(("one", "two"), servers, strict=True)]
    try:
        asked = request_.into(tmp_path / "out")
        process = shell(client.replace("...", '"$@"'), "three", *asked.argv, *CUT)
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
        assert_same(asked.out, alone)
    finally:
        for other in reversed(others):
            other.terminate()
            other.communicate(timeout=30)
    process = shell(client.replace("...", '"$@"'), "three", *asked.argv, *CUT, "--overwrite")
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2, "the scheduler is gone"
    assert "no Dask scheduler answers there" in told


@pytest.mark.slow
def test_the_slurm_job_of_the_scale_page_runs(shell, alone, request_, tmp_path):
    """A stand-in for srun starts two of the tasks."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\ntrap "kill %1 %2" TERM\n"$@" &\n"$@" &\nwait\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    asked = request_.into(tmp_path / "out")
    process = shell(recipes()[-1], "job", *asked.argv, *CUT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert_same(asked.out, alone)
    assert not list(tmp_path.glob("keys.*")), "the key is not kept"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_worker_uses_its_own_device(planned):
    _, cut = planned
    unit = cut(1, 1)[0]
    elsewhere = replace(unit, request=replace(unit.request, device1="cuda:7", device2="cuda:7"))
    assert measure_unit(elsewhere, own_device=False).status != "done"
    assert measure_unit(elsewhere, own_device=True).status == "done"


def test_a_unit_waits_for_a_worker_that_still_measures_it(planned, monkeypatch):
    """The other worker lost the connection to the scheduler, and with it the unit, but still runs."""
    _, cut = planned
    unit = cut(1, 1)[0]
    looks = []
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: (looks.append(seconds), other.close()))
    unit.folder.mkdir(parents=True)
    with ExitStack() as other:
        other.enter_context(exclusive(unit.folder / "unit"))
        assert measure_unit(unit, own_device=False).status == "done"
    assert looks == [worker.LOCK_RETRY]


def test_a_unit_that_stays_locked_is_given_up_and_its_folder_named(planned, monkeypatch):
    _, cut = planned
    unit = cut(1, 1)[0]
    monkeypatch.setattr(worker, "LOCK_RETRY", 0.01)
    monkeypatch.setattr(worker, "LOCK_ATTEMPTS", 3)
    unit.folder.mkdir(parents=True)
    with exclusive(unit.folder / "unit"):
        outcome = measure_unit(unit, own_device=False)
    assert outcome.status == "failed"
    assert str(unit.folder) in outcome.line


def test_a_worker_with_another_program_rejects_its_unit(planned):
    _, cut = planned
    outcome = worker.run_unit(cut(1, 1)[0], Path.cwd(), False, "0" * 64)
    assert outcome.status == "refused"
    assert "runs different source code of delta-selectivity than this process" in outcome.line


def test_the_bar_counts_probes_and_units(planned, capsys):
    _, cut = planned
    todo = cut(3, 2)
    with UnitsBar(todo, quiet=False) as bar:
        for unit in todo:
            bar.add(unit)
    total = sum(unit.n_probes for unit in todo)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{total} of {total}" in last
    assert f"{len(todo)} of {len(todo)} units" in last


def test_the_simulation_of_three_units_on_two_workers_by_hand():
    """Two tasks read 10 bytes each at 0.5 bytes per second and compute for 5 s; the third has the full bandwidth."""
    found = simulate([Task(10, 5)] * 3, n_workers=2, bytes_per_second=1)
    assert found.seconds == pytest.approx(20 + 5 + 10 + 5)
    assert found.reading == pytest.approx((2 * 20 + 10) / 80)
    assert found.computing == pytest.approx(15 / 80)


@pytest.mark.parametrize("n_workers", [1, 3, 8])
def test_a_simulation_keeps_to_the_bounds_of_list_scheduling(n_workers):
    """Graham 1966: at most the mean load plus the longest task, at least either of them."""
    seconds = [float(s) for s in np.random.default_rng(0).integers(1, 50, size=40)]
    found = simulate([Task(0.0, s) for s in seconds], n_workers, bytes_per_second=1.0)
    assert max(sum(seconds) / n_workers, max(seconds)) <= found.seconds <= sum(seconds) / n_workers + max(seconds)
    assert found.computing == pytest.approx(sum(seconds) / (n_workers * found.seconds))


def test_every_sae_of_gemma_scope_is_in_one_unit():
    saes = gemma_scope.listed()
    assert len({(sae.size, sae.base, sae.place) for sae in saes}) == 9
    found = list(gemma_scope.work(saes))
    assert sum(n for _, n, _, _ in found) == len(saes) == 2430
