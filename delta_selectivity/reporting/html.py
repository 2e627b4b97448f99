"""Build HTML with every text escaped.

>>> element("td", "a < b", class_="wide")
'<td class="wide">a &lt; b</td>'
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from delta_selectivity.system.terminal import printable

VOID = {"input", "meta"}


class Markup(str):
    """HTML that is safe as it stands. Made by `element` and `join`, or from files of ours."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | None) -> Markup:
    """An element. A trailing `_` of an attribute's name goes and other `_` become `-`; None leaves it out."""
    told = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{told}>" if tag in VOID else f"<{tag}{told}>{join(children)}</{tag}>")


def join(children: Iterable[str], between: str = "") -> Markup:
    """One after the other; texts are escaped."""
    return Markup(between.join(c if isinstance(c, Markup) else _escaped(c) for c in children))


def _escaped(text: str) -> str:
    """Names come from data: nothing in them is markup, turns the line around, or is no character at all."""
    return html.escape(printable(text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], **attributes: str | None) -> Markup:
    """A table whose rows become lists in a narrow window; the first cell of a row is its header."""
    body = (
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, data_head=name) for name, cell in zip(head[1:], row[1:], strict=True)),
        )
        for row in rows
    )
    heads = (element("th", name, scope="col") for name in head)
    inner = element("table", element("thead", element("tr", *heads)), element("tbody", *body), **attributes)
    return element("div", inner, class_="scroll lists", tabindex="0")
