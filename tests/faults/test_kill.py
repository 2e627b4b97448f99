"""SIGKILL at random moments: files on disk are whole, and the same command produces the undisturbed run's results."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from conftest import people, write_csv, write_sparsify
from runs import ROOT, Request, files, left_over, numbers, scores_of, substance

DEMO = ROOT / "assets" / "tiny-pythia"
DEMO_SAES = (ROOT / "assets" / "tiny-pythia-saes-k8", ROOT / "assets" / "tiny-pythia-saes-k32")
EXIT_SECONDS = 0.2  # about the time between the last result and the end of the process
needs_demo = pytest.mark.skipif(not (DEMO / "config.json").is_file(), reason="the bundled model is not there")


@pytest.fixture
def tiny_request(tiny_model, tiny_saes, tmp_path):
    """Return a request with two SAEs, three layers and two datasets: twelve writes."""
    data = write_csv(tmp_path / "women.csv", people(400))
    other = write_sparsify(tmp_path / "sae-sparser", k=2)
    flags = ("--datasets", "politics", "--shuffle_select_n", "200", "--repeats", "4")
    return Request(tiny_model, (tiny_saes, other), data, tmp_path / "undisturbed", flags)


@pytest.fixture
def demo_request(tmp_path):
    """Return a request with the bundled model, both SAEs, all datasets and two layers, on some rows: twenty writes."""
    flags = ("--layers", "1,3", "--shuffle_select_n", "100", "--folds", "3", "--repeats", "2")
    return Request(DEMO, DEMO_SAES, Path(), tmp_path / "undisturbed", flags)


def n_results(folder):
    """Return the number of layers on disk. Reads every file, which must be whole."""
    return sum(map(len, numbers(folder).values()))


def wait_for(ask, process, n):
    """Wait for this many results, or for the end of the process."""
    while process.poll() is None and n_results(ask.out) < n:
        time.sleep(0.005)


def kill_at(ask, n, seconds):
    """Start a run, kill it some time after the n-th result (0: after the start), and return whether it was killed."""
    with ask.start() as process:
        wait_for(ask, process, n)
        time.sleep(seconds)
        process.kill()
        return process.wait(60) != 0


def timed(ask):
    """Return the seconds from the start to the first result, and from there to the last."""
    start = time.time()
    with ask.start() as process:
        wait_for(ask, process, 1)
        first = time.time() - start
        assert process.wait(600) == 0
    return first, max(path.stat().st_mtime for path in files(ask.out)) - start - first


def check_kills(ask, folder, n, capsys):
    """Kill and rerun n times. Of six kills, two come at any time, three after the first result, one after the last."""
    before, writing = timed(ask)
    undisturbed, everything = (substance(ask.out), scores_of(ask.out)), n_results(ask.out)
    any_time, after_first, after_last = (0, before + writing), (1, writing), (everything, EXIT_SECONDS)
    kinds = (any_time, after_first, after_last, any_time, after_first, after_first)
    moments = random.Random(0)
    stages = {"before the first result": 0, "between results": 0, "after the last": 0}
    for i in range(n):
        again = ask.into(folder / str(i))
        after, most = kinds[i % len(kinds)]
        seconds = moments.uniform(0, most)
        where = f"kill {i}, {seconds:.2f} s after {after} results"
        killed = kill_at(again, after, seconds)
        done = n_results(again.out)
        stages[list(stages)[0 if not done else 1 if done < everything else 2]] += 1
        assert killed or done == everything, where
        assert again.run(600) == 0, where
        assert (substance(again.out), scores_of(again.out)) == undisturbed, where
        assert left_over(again.out) == [], where
    assert all(stages.values()) or n < len(kinds), stages
    with capsys.disabled():
        print(f" [{n} of {n} kills in runs of {before + writing:.1f} s survived: {stages}]", end="")


def test_three_kills(tiny_request, tmp_path, capsys):
    check_kills(tiny_request, tmp_path, 3, capsys)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills(tiny_request, tmp_path, capsys):
    check_kills(tiny_request, tmp_path, 50, capsys)


@needs_demo
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_kills_of_the_demo(demo_request, tmp_path, capsys):
    check_kills(demo_request, tmp_path, 50, capsys)
