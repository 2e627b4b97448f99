"""The command `probe`: computes the metric for a file of rows from any source.

    python activations.py --layers 3 --datasets gender -o rows.safetensors
    python probes.py rows.safetensors
    python probes.py my_vision_model.npz --views error -o results.json

docs/rows_file.md describes the file.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from delta_selectivity.cli.command_line import add_flags, add_verbose, parse_values
from delta_selectivity.cli.guard import guarded, set_log_level
from delta_selectivity.cli.parser import Parser, user_path
from delta_selectivity.cli.program import command_text
from delta_selectivity.errors import RequestError
from delta_selectivity.settings import PROBING
from delta_selectivity.system.terminal import show

log = logging.getLogger("delta_selectivity")

EXAMPLES = """\
examples:
  {extract} --layers 3 --datasets gender -o rows.safetensors
  {probe} rows.safetensors
      print a line for each SAE and probe
  {probe} my_vision_model.npz --views error -o results.json
      measure a file of your own, and write every number as JSON

docs/rows_file.md documents the file.
"""


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser of this command."""
    examples = EXAMPLES.format(**{name: command_text(name, prog) for name in ("extract", "probe")})
    description = "Train probes on the activations in a file of rows and on their reconstructions, and compare them."
    parser = Parser(prog, f"{description} Settings default to those stored in the file.", epilog=examples)
    parser.add_argument("rows", type=user_path, metavar="FILE", help="a .safetensors, .npz or .parquet file of rows")
    parser.add_argument(
        "-o", "--output", type=user_path, metavar="FILE", help="write every number to this .json or .csv file"
    )
    add_flags(parser, only=(*PROBING, "device2"))
    parser.add_argument("--quiet", action="store_true", help="print no table, only warnings")
    add_verbose(parser)
    return parser


def run(argv: Sequence[str], prog: str) -> None:
    """Measure the file. Raises `RequestError` if the request or the file is wrong, other errors if it fails."""
    values = parse_values(argv, build_parser(prog))
    set_log_level(bool(values.get("verbose")))
    from delta_selectivity.records.result_file import write_json
    from delta_selectivity.records.rows_file import load
    from delta_selectivity.reporting.csv_file import write_rows_csv
    from delta_selectivity.reporting.tables import LEGEND, rows_table
    from delta_selectivity.run.probe_rows import probe_rows, settings_of
    from delta_selectivity.run.request import choose_devices

    output: Path | None = values.get("output")
    if output is not None and output.suffix.lower() not in (".json", ".csv"):
        raise RequestError(f"--output {output}: give a .json or a .csv file")
    rows = load(values["rows"])
    settings = settings_of(rows, **{name: values[name] for name in PROBING if name in values})
    _, device = choose_devices(None, values.get("device2"))
    measured = probe_rows(rows, settings, device)
    for line in measured.warnings():
        log.warning("%s", line)
    results = measured.to_json()
    if output is not None:
        try:
            if output.suffix.lower() == ".csv":
                write_rows_csv(output, results)
            else:
                write_json(output, results)
        except OSError as error:
            raise RequestError(f"{output}: cannot be written: {error.strerror or error}") from error
    if not values.get("quiet"):
        show(f"{rows_table(results)}\n\n{LEGEND}")


def main(argv: Sequence[str] | None = None, prog: str = "probes.py") -> int:
    """Run the command and return its exit code."""
    return guarded(argv, lambda arguments: run(arguments, prog))
