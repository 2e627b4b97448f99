"""Validate the metric: reconstructions with known effects, coverage of the intervals, and false positives.

    python -m scripts.validate                  # quick: minutes
    python -m scripts.validate --full --write   # 500 repeats in all settings; writes the table to docs/validation.md
    python -m scripts.validate --people --write # only coverage, with few people and people of unequal size

Prints each row as measured, required, pass or FAIL. The exit code is 1 if a row fails.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and with `--write` update the document; return 1 if a row fails."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the matrices are small: parallelise over processes, not threads
    from validation import document, suite, table

    scale = suite.PEOPLE if args.people else suite.FULL if args.full else suite.QUICK
    if args.repeats is not None:
        scale = replace(scale, repeats=args.repeats)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    start = time.perf_counter()
    rows = suite.validate(scale, args.workers, args.seed)
    seconds = time.perf_counter() - start
    print(table.as_text(rows))
    failed = table.failures(rows)
    required = sum(row.passed is not None for row in rows)
    print(f"\n{len(failed)} of {required} required figures are not met; {seconds:.0f} s")
    if args.write and args.people:
        document.replace_settings(PROJECT / "docs" / "validation.md", rows, scale, args.seed, seconds)
    elif args.write:
        document.write(PROJECT / "docs" / "validation.md", rows, scale, args.seed, seconds)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full", action="store_true", help="every setting, all repeats, more rows of the bundled model"
    )
    parser.add_argument(
        "--people", action="store_true", help="only the settings with few people and people of unequal size; no plants"
    )
    parser.add_argument("--repeats", type=int, help="draws of each setting, instead of the mode's default")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes for the repeats (all cores)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table to docs/validation.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
