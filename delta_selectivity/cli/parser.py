"""The parser that every command shares."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from delta_selectivity.errors import RequestError


class Parser(argparse.ArgumentParser):
    """A parser with one line for a wrong flag, and no value for a flag that is not given."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see --help)")
