"""The fit cache: no probe of the model's view is fitted twice, no bit changes, and stale fits are not read."""

from __future__ import annotations

import functools
import hashlib
import logging
import runpy
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import N_LAYERS, people, write_csv
from runs import Request, numbers, scores_of
from test_house import STORAGE, imported, module_file

from delta_selectivity.caches import fit_cache, setup_cache, shard_folder
from delta_selectivity.caches.fit_cache import FitCache
from delta_selectivity.cli.command_line import parse
from delta_selectivity.probing.backends.problem import ProbeProblem
from delta_selectivity.probing.backends.sklearn_reference import SklearnReference
from delta_selectivity.probing.backends.torch_lbfgs import TorchLbfgs
from delta_selectivity.probing.folds import FoldPlan, control_plan
from delta_selectivity.probing.selectivity import ModelFit, fit_model
from delta_selectivity.run.planning import make_plan
from delta_selectivity.scale import units, worker
from delta_selectivity.scale.same_program import own_digest
from delta_selectivity.system import provenance
from delta_selectivity.system.provenance import PACKAGE, program_digest

BACKEND = TorchLbfgs()
OF_MODEL, OF_SAE = 2 * N_LAYERS, N_LAYERS  # fits of a run: the model's view and the control task; an SAE's view


@pytest.fixture
def fitted(monkeypatch):
    """Count how often each problem was fitted, by the digest of its features."""
    counted: Counter[str] = Counter()

    def counting(plain):
        def fit(self, problem: ProbeProblem, path):
            counted[hashlib.sha256(problem.x.numpy().tobytes()).hexdigest()] += 1
            return plain(self, problem, path)

        return fit

    for backend in (TorchLbfgs, SklearnReference):
        monkeypatch.setattr(backend, "fit", counting(backend.fit))
    return counted


@pytest.fixture
def new_process(monkeypatch):
    """Clear what a process reads once: the text of the program and the libraries."""

    def forget() -> None:
        for name in ("running_program", "installed_version"):
            taken = functools.cache(getattr(provenance, name).__wrapped__)
            for module in (provenance, fit_cache, setup_cache):
                monkeypatch.setattr(module, name, taken)

    forget()
    return forget


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("probes/*.safetensors"))


# mark it as used


def test_another_sae_fits_only_its_own_view(with_cache, other_saes, fitted, tmp_path, caplog):
    plain = Request(with_cache.model, (other_saes,), with_cache.data, tmp_path / "plain")
    assert plain.run() == 0
    assert fitted.total() == OF_MODEL + OF_SAE
    without_cache = Counter(fitted)
    fitted.clear()
    assert with_cache.run() == 0
    of_model = fitted & without_cache  # the fits of both SAEs' runs
    assert of_model.total() == OF_MODEL
    fitted.clear()
    caplog.set_level(logging.INFO, "fit_cache")
    second = Request(with_cache.model, (other_saes,), with_cache.data, tmp_path / "second", with_cache.more)
    assert second.plus("--verbose").run() == 0
    assert fitted == without_cache - of_model
    assert caplog.text.count("read probes of") == N_LAYERS
    assert numbers(tmp_path / "second") == numbers(tmp_path / "plain")
    assert scores_of(tmp_path / "second") == scores_of(tmp_path / "plain")


def test_a_cold_or_warm_fit_cache_changes_no_bit(with_cache, tmp_path):
    """Covers all views, and baselines, which share the model's fits with the SAE."""
    views = ("--views", "model,sae,error,latents", "--baselines", "identity,mean,names")
    assert with_cache.plus(*views).run() == 0
    assert with_cache.plus(*views).into(tmp_path / "warm").run() == 0
    plain = Request(with_cache.model, with_cache.saes, with_cache.data, tmp_path / "plain")
    assert plain.plus(*views).run() == 0
    assert numbers(with_cache.out) == numbers(tmp_path / "warm") == numbers(tmp_path / "plain")
    assert scores_of(with_cache.out) == scores_of(tmp_path / "warm") == scores_of(tmp_path / "plain")


@pytest.mark.parametrize(
    ("flags", "n_fits"),
    [
        (("--epsilon", "0.05"), OF_SAE),
        (("--seed", "1"), OF_MODEL + OF_SAE),
        (("--folds", "4"), OF_MODEL + OF_SAE),
        (("--repeats", "2"), OF_MODEL + OF_SAE),
        (("--positions", "mean"), OF_MODEL + OF_SAE),
        (("--probe", "sklearn"), OF_MODEL + OF_SAE),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else None,
)
def test_settings_that_affect_a_fit_are_part_of_its_key(with_cache, fitted, tmp_path, flags, n_fits):
    assert with_cache.run() == 0
    fitted.clear()
    assert with_cache.plus(*flags).into(tmp_path / "second").run() == 0
    assert fitted.total() == n_fits


def test_data_and_program_are_part_of_the_key(with_cache, fitted, tmp_path, monkeypatch, new_process):
    assert with_cache.run() == 0
    fitted.clear()
    data = write_csv(tmp_path / "more.csv", people(200))
    assert Request(with_cache.model, with_cache.saes, data, tmp_path / "more", with_cache.more).run() == 0
    assert fitted.total() == OF_MODEL + OF_SAE
    monkeypatch.setattr(provenance, "program_digest", lambda root, sources: "a" * 64)
    new_process()
    fitted.clear()
    assert with_cache.into(tmp_path / "changed").run() == 0
    assert fitted.total() == OF_MODEL + OF_SAE


def test_fits_do_not_depend_on_other_tasks(with_cache, fitted, tmp_path):
    """People get other numbers then, on which no fit depends."""
    assert with_cache.run() == 0
    fitted.clear()
    rows = [{**row, "task": "women"} for row in people(240)]
    rows += [{**row, "task": "others", "group": f"A. {row['group']}"} for row in people(60, seed=1)]
    both = replace(with_cache, data=write_csv(tmp_path / "both.csv", rows)).into(tmp_path / "both")
    assert both.run() == 0
    assert fitted.total() == OF_MODEL + 2 * OF_SAE, "of the other task, and of the SAE in both"


def test_units_of_workers_read_the_fits_of_main(with_cache, fitted, tmp_path, monkeypatch):
    assert with_cache.run() == 0
    fitted.clear()
    monkeypatch.chdir(tmp_path)
    request = parse(with_cache.into(tmp_path / "units").argv).request
    for unit in units.plan_units(make_plan(request), layers_per_unit=1, saes_per_unit=1):
        assert worker.run_unit(unit, tmp_path, False, own_digest()).status == "done"
    assert fitted.total() == OF_SAE


def test_a_full_disk_is_no_error(with_cache, tmp_path, monkeypatch, caplog):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_folder, "replacing", full)
    assert with_cache.run() == 0
    assert caplog.text.count("No space left on device: probe fits are not cached from now on") == 1
    monkeypatch.undo()
    plain = Request(with_cache.model, with_cache.saes, with_cache.data, tmp_path / "plain")
    assert plain.run() == 0
    assert numbers(with_cache.out) == numbers(tmp_path / "plain")


def flipped(path: Path, _other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 0xFF
    path.write_bytes(content)


def cut(path: Path, _other: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def emptied(path: Path, _other: Path) -> None:
    path.write_bytes(b"")


def exchanged(path: Path, other: Path) -> None:
    shutil.copy(other, path)


@pytest.mark.parametrize("damage", [flipped, cut, emptied, exchanged])
def test_a_broken_fit_is_reported_removed_and_refitted(with_cache, fitted, tmp_path, caplog, damage):
    assert with_cache.run() == 0
    whole = {path: path.read_bytes() for path in shards(tmp_path / "cache")}
    damage(*list(whole)[:2])
    fitted.clear()
    assert with_cache.into(tmp_path / "second").run() == 0
    assert fitted.total() == OF_SAE + OF_MODEL // N_LAYERS
    assert caplog.text.count("is damaged") == 1
    assert numbers(with_cache.out) == numbers(tmp_path / "second")
    assert scores_of(with_cache.out) == scores_of(tmp_path / "second")
    assert {path: path.read_bytes() for path in shards(tmp_path / "cache")} == whole


# section by section of the file


N, D = 120, 6


def task(seed: int = 0, **changes) -> dict:
    """Return the arguments of `fit_model`: two targets of 60 people, with the control task of 30 token types."""
    random = np.random.default_rng(seed)
    labels = random.random((2, 60)) < 0.5
    plan = FoldPlan.build(labels.repeat(2, axis=1), np.arange(N) // 2, random.random(N) + 0.5, 3, 2, seed)
    control = control_plan(np.arange(N) // 4, np.arange(N), None, 3, seed)
    x = torch.from_numpy(random.standard_normal((N, D)).astype(np.float32) + labels.repeat(2, axis=1)[:1].T)
    return {"plan": plan, "x": x, "backend": BACKEND, "control": control} | changes


def same(one: ModelFit, other: ModelFit) -> bool:
    """Return whether two fits are bitwise identical, with types, shapes and memory order."""
    pairs = [(one.scale, other.scale), *((getattr(one.fit, name), getattr(other.fit, name)) for name in vars(one.fit))]
    if one.control is not None:
        assert one.control.persons is not None
        pairs += [(getattr(one.control, name), getattr(other.control, name)) for name in ("labels", "weights", "folds")]
        pairs.append((one.control.views["model"], other.control.views["model"]))
    assert one.cs == other.cs
    assert (one.control is None) == (other.control is None)
    tensors = [(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs]
    return all(type(a) is type(b) for a, b in pairs) and all(
        a.dtype == b.dtype and torch.equal(a, b) and (a.stride() == b.stride() or not a.numel()) for a, b in tensors
    )


@pytest.mark.parametrize("control", [True, False])
def test_cached_fits_are_unchanged(tmp_path, fitted, control):
    given = task() if control else task(control=None)
    FitCache.open(tmp_path, 1).fit_model(**given)
    fitted.clear()
    found = FitCache.open(tmp_path, 1).fit_model(**given)
    assert not fitted
    assert found.x is given["x"]
    assert same(found, fit_model(**given))
    aligned = [found.scale, found.fit.coef, found.fit.intercept, found.fit.scores]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in aligned), "as fresh ones, or products of them round otherwise"


def test_a_problem_without_targets_has_no_cached_fit(tmp_path):
    """There are too few people: nothing is measured, with a cold or a warm cache."""
    nobody = FoldPlan.build(np.ones((1, N)), np.arange(N), None, 3, 1, 0)
    for _ in range(2):
        found = FitCache.open(tmp_path, 1).fit_model(**task(plan=nobody))
        assert same(found, fit_model(**task(plan=nobody)))


def changed(name: str, **parts) -> Callable[[dict], dict]:
    return lambda given: given | {name: replace(given[name], **{k: f(given[name]) for k, f in parts.items()})}


def nudged(given: dict) -> dict:
    x = given["x"].clone()
    x[5, 3] = torch.nextafter(x[5, 3], torch.tensor(9.0))
    return given | {"x": x}


def other_first(array: np.ndarray) -> np.ndarray:
    found = array.copy()
    found[..., 0] = 1 - found[..., 0]
    return found


@pytest.mark.parametrize(
    "change",
    [
        nudged,
        lambda given: given | {"x": given["x"][:, :-1]},
        lambda given: given | {"x": given["x"].double()},
        lambda given: given | {"control": None},
        lambda given: given | {"backend": TorchLbfgs(tolerance=1e-5)},
        lambda given: given | {"backend": SklearnReference()},
        changed("plan", labels=lambda plan: plan.labels[:1], kept=lambda plan: (0,)),
        changed("plan", labels=lambda plan: plan.labels[[1, 0]]),
        changed("plan", weights=lambda plan: other_first(plan.weights)),
        changed("plan", folds=lambda plan: other_first(plan.folds)),
        changed("plan", folds=lambda plan: plan.folds[:1]),
        changed("control", labels=lambda plan: ~plan.labels),
        changed("control", weights=lambda plan: plan.weights * 2),
        changed("control", folds=lambda plan: (plan.folds + 1) % 3),
    ],
)
def test_every_input_of_a_fit_is_part_of_its_key(tmp_path, fitted, change):
    FitCache.open(tmp_path, 1).fit_model(**task())
    fitted.clear()
    given = change(task())
    found = FitCache.open(tmp_path, 1).fit_model(**given)
    assert fitted
    assert same(found, fit_model(**given))


def test_the_identity_of_people_is_not_part_of_the_key(tmp_path, fitted):
    FitCache.open(tmp_path, 1).fit_model(**task())
    fitted.clear()
    FitCache.open(tmp_path, 1).fit_model(**changed("plan", groups=lambda plan: plan.groups + 7)(task()))
    assert not fitted


@pytest.mark.parametrize("what", ["threads", "processor"])
def test_the_number_of_threads_is_part_of_the_key(tmp_path, fitted, monkeypatch, what):
    """Sums of two threads round differently from those of one."""
    cache = FitCache.open(tmp_path, 1)
    cache.fit_model(**task())
    fitted.clear()
    if what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    else:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "Z80")
    cache.fit_model(**task())
    assert fitted


@pytest.mark.parametrize("what", ["program", "library"])
def test_changed_libraries_count_from_the_next_process_on(tmp_path, fitted, monkeypatch, new_process, what):
    """Files may change during a long run and again in the same process: what was loaded is what computes."""
    cache = FitCache.open(tmp_path, 1)
    cache.fit_model(**task())
    fitted.clear()
    if what == "program":
        monkeypatch.setattr(provenance, "program_digest", lambda root, sources: "a" * 64)
    else:
        monkeypatch.setattr(provenance, "version", lambda name: "0.1")
    cache.fit_model(**task())
    FitCache.open(tmp_path, 1).fit_model(**task())
    assert not fitted
    new_process()
    FitCache.open(tmp_path, 1).fit_model(**task())
    assert fitted


def test_the_values_of_c_are_part_of_the_key(tmp_path, fitted, monkeypatch):
    FitCache.open(tmp_path, 1).fit_model(**task())
    fitted.clear()
    monkeypatch.setattr(fit_cache, "DEFAULT_CS", (0.1, 1.0))
    for _ in range(2):
        found = FitCache.open(tmp_path, 1).fit_model(**task())
        assert fitted
        assert same(found, fit_model(**task(), cs=(0.1, 1.0)))


def test_the_program_is_not_hashed_without_a_cache(monkeypatch):
    def refuse(self, *_args):
        raise AssertionError(f"{self.name} is read")

    monkeypatch.setattr(Path, "read_text", refuse)
    runpy.run_path(str(PACKAGE / "caches/fit_cache.py"))


def test_the_digest_covers_selectivity_and_its_imports(tmp_path):
    seen: set[Path] = set()
    left = [
        PACKAGE / "caches/fit_cache.py",
        PACKAGE / "probing/__init__.py",
        *(PACKAGE / "probing/backends").glob("*.py"),
    ]
    while left:
        path = left.pop()
        if path not in seen:
            seen.add(path)
            left += [module_file(name) for name in imported(path) - STORAGE]
    assert {path for source in fit_cache.SOURCES for path in PACKAGE.glob(source)} == seen
    for path in seen:
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text("utf-8"), "utf-8")
    assert program_digest(tmp_path, fit_cache.SOURCES) == program_digest(PACKAGE, fit_cache.SOURCES)
    for path in seen:
        copy = tmp_path / path.relative_to(PACKAGE)
        text = copy.read_text("utf-8")
        copy.write_text(f"{text}# another\n", "utf-8")
        assert program_digest(tmp_path, fit_cache.SOURCES) != program_digest(PACKAGE, fit_cache.SOURCES), path.name
        copy.write_text(text, "utf-8")


def test_concurrent_writers_leave_whole_fits(tmp_path, fitted, caplog):
    """Four runs fit the same problems in different orders."""
    expected = {seed: fit_model(**task(seed)) for seed in range(6)}
    caches = [FitCache.open(tmp_path, 1) for _ in range(4)]
    wrong = []

    def work(start: int, cache: FitCache) -> None:
        for seed in [*range(start, 6), *range(start)]:
            if not same(cache.fit_model(**task(seed)), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i % 2, cache)) for i, cache in enumerate(caches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(list((tmp_path / "probes").iterdir())) == 6, "a shard each, and nothing unfinished"
    fitted.clear()
    for seed in range(6):
        assert same(FitCache.open(tmp_path, 1).fit_model(**task(seed)), expected[seed])
    assert not fitted


def test_a_pattern_that_matches_no_file_of_the_program_is_an_error(tmp_path):
    (tmp_path / "solver.py").write_text("")
    assert program_digest(tmp_path, ["solver.py"])
    with pytest.raises(FileNotFoundError, match=r"moved\.py"):
        program_digest(tmp_path, ["solver.py", "moved.py"])
