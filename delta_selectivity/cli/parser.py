"""The parser that every command shares."""

from __future__ import annotations

import argparse
import difflib
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

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; an unknown flag is named, with the one that is meant if that can be guessed."""
        for word in args or ():
            flag = word.partition("=")[0]
            if flag.startswith("--") and len(flag) > 2 and flag not in self._option_string_actions:
                near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                self.error(f"there is no flag {flag}{f': did you mean {near[0]}?' if near else ''}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see --help)")
