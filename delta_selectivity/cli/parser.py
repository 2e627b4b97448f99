"""The argument parser that all commands share."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from delta_selectivity.errors import RequestError
from delta_selectivity.system.provenance import program_version
from delta_selectivity.system.terminal import show

STANDS_ALONE = "follows no flag: several values of one are written with commas, and spaces in quotes"
WIDTH = 100  # of a description in characters; argparse must not wrap the examples, so it wraps nothing


def user_path(text: str) -> Path:
    """Return a path with `~` expanded, which shells do not do after `=`."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a path")
    return Path(os.path.expanduser(text))  # noqa: PTH111 - leaves an unknown ~user as it is


def nearest(flag: str, known: Iterable[str]) -> str:
    """Return the message for an unknown flag, with the closest known one if there is any."""
    near = difflib.get_close_matches(flag, list(known), n=1)
    return f"there is no flag {flag}{f': did you mean {near[0]}?' if near else ''}"


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_given: Any) -> None:
        show(f"delta-selectivity {program_version()}")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line and omits flags that are not given."""

    elsewhere: tuple[str, ...] = ()  # flags of another parser, to suggest as well

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=prog,
            description=textwrap.fill(description, WIDTH),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **{"argument_default": argparse.SUPPRESS, **options},
        )
        self.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version, and end")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; the error for an unknown flag suggests the closest known one."""
        for word in args or ():
            flag = word.partition("=")[0]
            if flag.startswith("--") and len(flag) > 2 and flag not in self._option_string_actions:
                self.error(nearest(flag, [*self._option_string_actions, *self.elsewhere]))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if words := re.match("unrecognized arguments: (.*)", message):
            message = f"{words[1]!r} {STANDS_ALONE}"
        raise RequestError(f"{message} (see --help)")
