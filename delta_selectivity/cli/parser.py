"""The parser that every command shares."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any, NoReturn

from delta_selectivity.errors import RequestError

WIDTH = 100  # of a description in characters: examples below it keep their lines, so argparse wraps neither


class Parser(argparse.ArgumentParser):
    """A parser with one line for a wrong flag, and no value for a flag that is not given."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=prog,
            description=textwrap.fill(description, WIDTH),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see --help)")
