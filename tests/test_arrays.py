"""`probe_selectivity`: compared with a plain loop over scikit-learn, for all kinds of arrays, and its errors."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from test_selectivity import by_scikit_learn, damaged, world

from delta_selectivity.errors import RequestError
from delta_selectivity.probing import arrays
from delta_selectivity.probing.arrays import probe_selectivity
from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.selectivity import ProbeResult
from delta_selectivity.records.rows_file import RowProbe, Rows, load, save
from delta_selectivity.run.probe_rows import probe_rows
from delta_selectivity.settings import Settings
from delta_selectivity.system.person_ids import person_ids

SETTINGS = Settings(repeats=2, views="error")
X, LABELS, GROUPS = world()
RECON = damaged(X)


def selectivity(x=X, recon=RECON, labels=LABELS[0], groups=GROUPS, settings=SETTINGS):
    return probe_selectivity(x, recon, labels, groups, settings=settings)


WHOLE = selectivity()


def test_it_agrees_with_a_plain_loop_over_scikit_learn():
    plan = FoldPlan.build(LABELS, GROUPS, None, 5, 2, 0)
    for name, view in {"model": X, "sae": RECON, "error": X - RECON}.items():
        found = [by_scikit_learn(plan, view, X, repeat)[0] > 0 for repeat in range(2)]
        expected = np.mean([balanced_accuracy_score(LABELS[0], predicted) for predicted in found])
        assert getattr(WHOLE, f"{name}_sel") == pytest.approx(expected, abs=1e-12)
    assert isinstance(WHOLE, ProbeResult)
    assert WHOLE.memorisation is None


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".parquet"])
def test_a_file_of_the_same_rows_gives_the_same_bits(suffix, tmp_path):
    probe = RowProbe("target", np.arange(len(X)), LABELS[0])
    save(tmp_path / f"rows{suffix}", Rows(X.numpy(), {"sae": RECON.numpy()}, (probe,), GROUPS))
    found = probe_rows(load(tmp_path / f"rows{suffix}"), SETTINGS, "cpu").saes["sae"].records["target"]
    known = asdict(WHOLE)
    assert {name: value for name, value in found.items() if not name.endswith("q_value")} == {
        name: known[name] for name in found if not name.endswith("q_value")
    }


@pytest.mark.parametrize(
    "other",
    [
        {"x": X.numpy(), "recon": RECON.numpy()},
        {"x": X.double(), "recon": RECON.numpy().astype(np.float64)},
        {"x": X.clone().requires_grad_(), "recon": RECON.clone().requires_grad_()},
        {"x": X.T.contiguous().T, "recon": np.asfortranarray(RECON.numpy())},
        {"x": X.tolist()},
        {"labels": LABELS[0].astype(np.int64).tolist(), "groups": GROUPS.tolist()},
        {"labels": torch.from_numpy(LABELS[0]), "groups": torch.from_numpy(GROUPS)},
        {"labels": LABELS[0].astype(np.float32), "groups": GROUPS.astype(np.uint64)},
    ],
    ids=["numpy", "float64", "gradients", "strides", "lists", "more lists", "torch", "other numbers"],
)
def test_any_array_type_gives_the_same_bits(other):
    assert selectivity(**other) == WHOLE


def test_half_precision_is_used_unchanged():
    half = X.bfloat16()
    assert selectivity(x=half) == selectivity(x=half.float())
    assert selectivity(x=X.half().numpy()) == selectivity(x=X.half())


def test_string_groups_are_people_by_name():
    names = [f"person {group}" for group in GROUPS]
    assert selectivity(groups=names) == selectivity(groups=np.array(names)) == selectivity(groups=person_ids(names))


def test_equal_hashables_are_one_group():
    first = {group: i for i, group in enumerate(dict.fromkeys(GROUPS.tolist()))}
    numbers = np.array([first[group] for group in GROUPS.tolist()])
    assert selectivity(groups=[("person", int(group)) for group in GROUPS]) == selectivity(groups=numbers)


@pytest.mark.parametrize(
    "groups",
    [
        ["7", "7.0", "07", "Zo\u00eb", "Zoe\u0308", "ZOE\u0308"],
        ["7", 7.0, "07", "Zo\u00eb", "Zoe\u0308", "ZOE\u0308"],
        [("a", "7"), ("a", 7.0), ("a", "07"), ("Zo\u00eb",), ("Zoe\u0308",), ("ZOE\u0308",)],
        pd.Series(["7", "7.0", "07", "Zo\u00eb", "Zoe\u0308", "ZOE\u0308"]),
    ],
)
def test_equal_numbers_are_one_group_and_so_are_the_unicode_forms_of_a_name(groups):
    same = [list(ids).index(person) for ids in [arrays._group_ids(groups, 6)] for person in ids]
    assert same == [0, 0, 2, 3, 3, 5]


@pytest.mark.parametrize("kind", [np.float64, np.float32, list, pd.Series, torch.tensor])
def test_integer_groups_do_not_depend_on_their_type(kind):
    assert arrays._group_ids(kind([3.0, -1.0, 3.0]), 3).tolist() == [3, -1, 3]
    assert arrays._group_ids(np.array([3, -1, 3]), 3).tolist() == [3, -1, 3]


def test_inputs_are_not_changed():
    arrays = [X.clone().numpy(), RECON.clone().numpy(), LABELS[0].copy(), GROUPS.copy()]
    for array in arrays:
        array.flags.writeable = False
    assert probe_selectivity(*arrays, settings=SETTINGS) == WHOLE


def test_an_identical_reconstruction_loses_nothing():
    found = selectivity(recon=X)
    assert (found.delta_sel, found.transfer_delta, found.p_value) == (0, 0, 1)


NAN = X.clone()
NAN[7, 3] = float("nan")


@pytest.mark.parametrize(
    ("other", "field", "words"),
    [
        ({"x": NAN}, "x", "row 7"),
        ({"recon": NAN.numpy()}, "reconstruction", "row 7"),
        ({"x": X.double() * 1e300}, "x", "too large for float32"),
        ({"x": X[0]}, "x", "[rows, d]"),
        ({"x": X[:0]}, "x", "[rows, d]"),
        ({"x": [[1.0], [1.0, 2.0]]}, "x", "not an array"),
        ({"x": X.to_sparse()}, "x", "dense"),
        ({"x": X > 0}, "x", "real"),
        ({"x": X.numpy().astype(complex)}, "x", "real"),
        ({"recon": RECON[:, :-1]}, "reconstruction", "has shape"),
        ({"recon": np.array(["a"])}, "reconstruction", "real"),
        ({"labels": LABELS[0][:-1]}, "labels", "give shape [300]"),
        ({"labels": LABELS[0].astype(int) * 2}, "labels", "contain 2"),
        ({"labels": np.array(["yes"] * 300)}, "labels", "0 and 1"),
        ({"labels": np.ones(300, bool)}, "labels", "negative class"),
        ({"groups": GROUPS[:-1]}, "groups", "give shape [300]"),
        ({"groups": 5}, "groups", "for each row"),
        ({"groups": [[group] for group in GROUPS]}, "groups", "hashable"),
        ({"groups": [None, *GROUPS[1:]]}, "groups", "row 0"),
        ({"groups": np.where(np.arange(300) == 4, np.nan, GROUPS)}, "groups", "row 4"),
        ({"groups": np.zeros(300, int)}, "labels", "has 1 group"),
        ({"settings": Settings(views="latents")}, "views", "latents"),
        ({"settings": Settings(views="ksparse")}, "views", "ksparse"),
        ({"settings": Settings(downstream=True)}, "downstream", "no model"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(other, field, words):
    with pytest.raises(RequestError) as refused:
        selectivity(**other)
    assert refused.value.field == field
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.gpu
def test_it_computes_on_the_device_of_x():
    found = selectivity(x=X.cuda())
    assert found.model_sel == pytest.approx(WHOLE.model_sel, abs=0.01)
