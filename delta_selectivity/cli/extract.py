"""The command `extract`: writes activations, reconstructions, labels and groups of one layer's rows to a file.

    python activations.py --layers 3 --datasets gender -o rows.safetensors
    python probes.py rows.safetensors                                      # the numbers of main.py, bit for bit

docs/rows_file.md describes the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from delta_selectivity.cli.command_line import add_flags, add_verbose, make_request, parse_values, show_start
from delta_selectivity.cli.guard import guarded, set_log_level
from delta_selectivity.cli.parser import Parser, user_path
from delta_selectivity.cli.program import command_text
from delta_selectivity.system.terminal import show

EXAMPLES = """\
examples:
  {extract} --layers 3 --datasets gender -o rows.safetensors
  {probe} rows.safetensors
      computes the numbers of this run, bitwise identical:
  {run} --layers 3 --datasets gender

docs/rows_file.md documents the file.
"""

WITHOUT = ("list_datasets", "output_directory", "device2", "probe", "overwrite")


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser of this command."""
    examples = EXAMPLES.format(**{name: command_text(name, prog) for name in ("extract", "probe", "run")})
    parser = Parser(
        prog,
        "Write the activations of one layer at the probed positions, each SAE's reconstruction of them, the labels and "
        "the groups to a file. All flags have the same meaning as in a run.",
        epilog=examples,
    )
    parser.add_argument(
        "-o",
        "--output",
        type=user_path,
        required=True,
        metavar="FILE",
        help="the file to write: .safetensors, .npz or .parquet",
    )
    add_flags(parser, exclude=WITHOUT)
    parser.add_argument("--quiet", action="store_true", help="print no progress bar and no summary, only warnings")
    add_verbose(parser)
    return parser


def run(argv: Sequence[str], prog: str) -> None:
    """Write the file. Raises `RequestError` if the request is wrong, other errors if it fails."""
    values = parse_values(argv, build_parser(prog))
    set_log_level(bool(values.get("verbose")))
    show_start(values)
    path: Path = values["output"]
    from delta_selectivity.run.extraction import extract

    quiet = bool(values.get("quiet"))
    with _bar(quiet) as on_texts:
        rows = extract(make_request(values), path, on_texts)
    if not quiet:
        show(f"wrote {path}: {len(rows.x)} rows of width {rows.x.shape[1]}, {len(rows.recons)} SAEs")


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that draws the number of processed texts."""
    from delta_selectivity.system.bars import open_bar

    with open_bar(None, "texts", "text", quiet=quiet) as bar:

        def draw(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield draw


def main(argv: Sequence[str] | None = None, prog: str = "activations.py") -> int:
    """Run the command and return its exit code."""
    return guarded(argv, lambda arguments: run(arguments, prog))
