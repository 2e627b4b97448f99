"""Adapt matplotlib's SVG to a page: titles, tooltips, unique ids.

accessible(svg, name="heatmap_gender", title="gender", description="...", tips={"tip-0": "layer 0: -0.047"})
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

from delta_selectivity.reporting.styles import FONT, MUTED, RULE, TEXT_COLOUR

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", XLINK)
MODES = {
    TEXT_COLOUR: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
}  # CSS variables of the page's style sheet


def accessible(
    svg: str, name: str, title: str, description: str, tips: Mapping[str, str], cells: Mapping[str, int]
) -> str:
    """Return a stand-alone SVG document with a title, a description, and a tooltip on each part that has one.

    Args:
        svg: SVG as matplotlib writes it.
        name: Prefix of the ids of title and description.
        title: Title of the plot.
        description: Alternative text.
        tips: Id of a part -> its tooltip.
        cells: Id of a part -> number of the cell that it represents.
    """
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for size in ("width", "height"):
        root.set(size, root.get(size, "").removesuffix("pt"))  # one of our points is one pixel
    for group in root.iter(f"{{{SVG}}}g"):
        tip = tips.get(group.get("id", ""))
        if tip is not None:
            group.insert(0, _element("title", tip))
        number = cells.get(group.get("id", ""))
        if number is not None:
            group.set("data-cell", str(number))
    _drop_ids(root)
    _compact(root)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    root.insert(0, _element("desc", description, f"{name}-desc"))
    root.insert(0, _element("title", title, f"{name}-title"))
    fonts = ", ".join(f"'{font}'" if " " in font else font for font in FONT)
    return ElementTree.tostring(root, encoding="unicode").replace(f"'{FONT[0]}'", fonts) + "\n"


def inline(svg: str) -> str:
    """Return the SVG for embedding in a page, with the page's font and light or dark mode."""
    bare = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # its rules would apply to the whole page
    return re.sub("|".join(MODES), lambda colour: MODES[colour[0]], bare)


def _element(tag: str, text: str, own_id: str | None = None) -> ElementTree.Element:
    element = ElementTree.Element(f"{{{SVG}}}{tag}", {} if own_id is None else {"id": own_id})
    element.text = text
    return element


def _drop_ids(root: ElementTree.Element) -> None:
    """Remove ids without references: `axes_1` and the like occur in every plot of the page."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _compact(root: ElementTree.Element) -> None:
    """Remove whitespace between elements, empty groups and identity transforms: a third of the bytes."""
    for element in root.iter():
        element.tail = (element.tail or "").strip()
        if len(element):
            element.text = (element.text or "").strip()
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        for child in [child for child in element if child.tag == f"{{{SVG}}}g" and not len(child)]:
            element.remove(child)
