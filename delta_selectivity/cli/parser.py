"""The parser that every command shares."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import os
import re
import textwrap
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from delta_selectivity.errors import RequestError
from delta_selectivity.system.terminal import show

STANDS_ALONE = "follows no flag: several values of one are written with commas, and spaces in quotes"
WIDTH = 100  # of a description in characters: examples below it keep their lines, so argparse wraps neither


def user_path(text: str) -> Path:
    """A path with `~` resolved, which no shell does after `=`."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a path")
    return Path(os.path.expanduser(text))  # noqa: PTH111 - leaves an unknown ~user as it is


def nearest(flag: str, known: Iterable[str]) -> str:
    """What to say of a flag that there is not: with the one that is meant, if that can be guessed."""
    near = difflib.get_close_matches(flag, list(known), n=1)
    return f"there is no flag {flag}{f': did you mean {near[0]}?' if near else ''}"


def version() -> str:
    """The version of this program: a clone's own, whatever is installed beside it."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.is_file():
        return importlib.metadata.version("delta-selectivity")
    return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_given: Any) -> None:
        show(f"delta-selectivity {version()}")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """A parser with one line for a wrong flag, and no value for a flag that is not given."""

    elsewhere: tuple[str, ...] = ()  # flags that another parser has taken before, and that may be meant

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
        """Parse a command line; an unknown flag is named, with the one that is meant if that can be guessed."""
        for word in args or ():
            flag = word.partition("=")[0]
            if flag.startswith("--") and len(flag) > 2 and flag not in self._option_string_actions:
                self.error(nearest(flag, [*self._option_string_actions, *self.elsewhere]))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if words := re.match("unrecognized arguments: (.*)", message):
            message = f"{words[1]!r} {STANDS_ALONE}"
        raise RequestError(f"{message} (see --help)")
