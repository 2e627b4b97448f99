"""Settings of the process: made by programs, not by the library, and never against the user's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
AFTER_A_PROGRAM = f"""
import os, sys
from delta_selectivity.cli import program
from delta_selectivity.system import interrupts
interrupts.exit_now = lambda code: print(os.environ.get("{VARIABLE}"), "torch" in sys.modules)
sys.argv = ["main.py", "--version"]
try:
    program.start("run")
except SystemExit:
    interrupts.exit_now(0)
"""
AFTER_THE_LIBRARY = f"import os, delta_selectivity as ds; ds.Settings(); print(os.environ.get('{VARIABLE}'))"


@pytest.mark.parametrize(
    ("code", "given", "expected"),
    [(AFTER_A_PROGRAM, None, "256"), (AFTER_A_PROGRAM, "7", "7"), (AFTER_THE_LIBRARY, None, "None")],
)
def test_the_cache_of_compiled_products_is_limited_by_programs_only(code: str, given: str | None, expected: str):
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if given is not None:
        environment[VARIABLE] = given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split()[0] == expected
