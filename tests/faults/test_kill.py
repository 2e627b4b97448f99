"""SIGKILL at random moments: what is on disk is whole, and the same command ends with the undisturbed run's results."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from conftest import people, write_csv, write_sparsify
from runs import ROOT, Request, files, left_over, numbers, substance

DEMO = ROOT / "assets" / "tiny-pythia"
DEMO_SAES = (ROOT / "assets" / "tiny-pythia-saes-k8", ROOT / "assets" / "tiny-pythia-saes-k32")
needs_demo = pytest.mark.skipif(not (DEMO / "config.json").is_file(), reason="the bundled model is not there")


@pytest.fixture
def tiny_request(tiny_model, tiny_saes, tmp_path):
    """Two SAEs, three layers, two datasets: twelve writes."""
    data = write_csv(tmp_path / "women.csv", people(400))
    other = write_sparsify(tmp_path / "sae-sparser", k=2)
    flags = ("--datasets", "politics", "--shuffle_select_n", "200", "--repeats", "10")
    return Request(tiny_model, (tiny_saes, other), data, tmp_path / "undisturbed", flags)


@pytest.fixture
def demo_request(tmp_path):
    """The bundled demo on some rows of every dataset."""
    flags = ("--shuffle_select_n", "150", "--repeats", "2")
    return Request(DEMO, DEMO_SAES, Path(), tmp_path / "undisturbed", flags)


def first_result(ask, process):
    """Wait for the first result file, or the end of the process."""
    while process.poll() is None and not files(ask.out):
        time.sleep(0.003)


def kill_at(ask, seconds, after_first_result):
    """Start, and kill so long after the start or after the first result; whether it was killed."""
    with ask.start() as process:
        if after_first_result:
            first_result(ask, process)
        time.sleep(seconds)
        process.kill()
        return process.wait(60) != 0


def timed(ask):
    """Seconds from the start to the first result, and from there to the last."""
    start = time.time()
    with ask.start() as process:
        first_result(ask, process)
        first = time.time() - start
        assert process.wait(600) == 0
    return first, max(path.stat().st_mtime for path in files(ask.out)) - start - first


def check_kills(ask, folder, n, capsys):
    """Kill and rerun n times; of every three kills one comes at any time, two while results are being written."""
    before, writing = timed(ask.into(folder / "timed"))
    assert ask.run(600) == 0
    undisturbed, final = substance(ask.out), numbers(ask.out)
    moments = random.Random(0)
    stages = {"before the first result": 0, "between results": 0, "after the last": 0}
    for i in range(n):
        again = ask.into(folder / str(i))
        early = i % 3 == 0
        seconds = moments.uniform(0.05, before + writing) if early else moments.uniform(0, writing)
        killed = kill_at(again, seconds, after_first_result=not early)
        found = numbers(again.out)  # reads every file: each is whole
        done = sum(map(len, found.values()))
        everything = sum(map(len, final.values()))
        stages[list(stages)[0 if not done else 1 if done < everything else 2]] += 1
        assert killed or done == everything
        assert again.run(600) == 0, f"after a kill at {seconds:.2f} s"
        assert substance(again.out) == undisturbed, f"after a kill at {seconds:.2f} s"
        assert left_over(again.out) == [], f"after a kill at {seconds:.2f} s"
        assert len(files(again.out)) == len(final)
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
