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
    """HTML that needs no escaping, made by `element`, `join` or from files of this package."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | None) -> Markup:
    """Return an element. In attribute names, a trailing `_` is removed and other `_` become `-`; None omits it."""
    attribute_text = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{attribute_text}>" if tag in VOID else f"<{tag}{attribute_text}>{join(children)}</{tag}>")


def join(children: Iterable[str], between: str = "") -> Markup:
    """Concatenate the children; plain texts are escaped."""
    return Markup(between.join(c if isinstance(c, Markup) else _escaped(c) for c in children))


def _escaped(text: str) -> str:
    """Escape markup, bidirectional controls and invalid characters, since names come from data."""
    return html.escape(printable(text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], **attributes: str | None) -> Markup:
    """Return a table whose rows become lists in a narrow window; the first cell of a row is its header."""
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
