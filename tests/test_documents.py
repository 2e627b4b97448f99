"""Statements of the documents about the code are true."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from delta_selectivity.probing.selectivity import ProbeResult
from delta_selectivity.run.downstream_figures import Downstream
from delta_selectivity.run.reconstruction import Reconstruction

ROOT = Path(__file__).resolve().parent.parent


def test_every_key_of_a_record_is_defined_and_no_other():
    page = (ROOT / "docs" / "numbers.md").read_text("utf-8").partition("## `_run`")[0]
    named = {key for key in re.findall(r"`([A-Za-z0-9_]+)`", page) if not key.startswith(("_", "layer_"))}
    known = {field.name for kind in (ProbeResult, Reconstruction, Downstream) for field in fields(kind)}
    assert named == known | {"q_value", "transfer_q_value", "reason"}


def test_the_tests_that_the_security_page_names_are_there():
    named = re.findall(r"`((?:faults/|fuzz/)?[a-z_]*(?:\.py)?)`", (ROOT / "SECURITY.md").read_text("utf-8"))
    tests = {name for name in named if name.startswith(("test_", "faults/", "fuzz/"))}
    assert len(tests) > 5
    assert all((ROOT / "tests" / name).exists() for name in tests)
