"""Update the tables in documents with the output of the commands above them.

A table stands between `<!-- python report.py results/demo --summary -->` and `<!-- end -->`.

    python -m scripts.update_tables README.md           # run the commands and rewrite the tables
    python -m scripts.update_tables --check README.md   # exit code 1 if a table is not up to date
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- python (?P<command>[^\n]+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)


def command_output(command: str) -> str:
    """Return what `python COMMAND` prints in the project's folder. Raises `CalledProcessError` if the command fails.

    Modules run in this process, which imports torch only once.
    """
    first, *rest = shlex.split(command)
    if first == "-m":
        return _printed_by(*rest).rstrip() + "\n"
    done = subprocess.run([sys.executable, first, *rest], cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout.rstrip() + "\n"


def _printed_by(module: str, *arguments: str) -> str:
    argv, printed = sys.argv, io.StringIO()
    sys.argv = [module, *arguments]
    try:
        with contextlib.chdir(PROJECT), contextlib.redirect_stdout(printed):
            runpy.run_path(f"{module.replace('.', '/')}.py", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise subprocess.CalledProcessError(1, f"python -m {module}", printed.getvalue(), str(end.code)) from end
    finally:
        sys.argv = argv
    return printed.getvalue()


def updated(text: str) -> str:
    """Return the document with every table as its command prints it now."""
    return BLOCK.sub(lambda block: f"{block[1]}{command_output(block['command'])}{block[4]}", text)


def main() -> int:
    """Rewrite the documents, or compare with `--check`."""
    parser = argparse.ArgumentParser(description="Keep tables in documents equal to what commands print.")
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    args = parser.parse_args()
    stale = 0
    for document in args.documents:
        text = document.read_text(encoding="utf-8")
        fresh = updated(text)
        stale += fresh != text
        if args.check and fresh != text:
            print(f"{document}: a table is out of date: python -m scripts.update_tables {document}")
        elif fresh != text:
            document.write_text(fresh, encoding="utf-8")
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
