"""The examples of the public docstrings run on a local model and SAEs."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import people, write_csv, write_sparsify

import delta_selectivity as ds

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_model, tiny_saes):
    """Create an empty directory with a task, and the names that the examples use."""
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "people.csv", people(300))
    x = np.random.default_rng(0).normal(size=(200, 5))
    names = {name: getattr(ds, name) for name in ds.__all__}
    names |= {"model": str(tiny_model), "sae": str(tiny_saes), "other_sae": str(write_sparsify(tmp_path / "k2", k=2))}
    names |= {"x": x, "x_hat": x + 0.1, "labels": x[:, 0] > 0, "groups": np.arange(200), "ds": ds, "torch": torch}
    return names


EXAMPLES = [
    example for name in ds.__all__ for example in doctest.DocTestFinder(recurse=False).find(getattr(ds, name), name)
]


@pytest.mark.parametrize("name", [example.name for example in EXAMPLES if example.examples])
def test_the_example_of_a_docstring_runs(name, here):
    (example,) = (one for one in EXAMPLES if one.name == name)
    example.globs = dict(here)
    told: list[str] = []
    found = doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    assert found.attempted
    assert not found.failed, "".join(told)


@pytest.mark.parametrize("name", ["evaluate", "Evaluator", "Results", "Settings", "load_sae", "load_task", "wrap_sae"])
def test_public_names_have_an_example(name):
    assert any(example.name == name and example.examples for example in EXAMPLES)
