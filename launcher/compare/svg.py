"""A matplotlib figure as SVG that lives in a page: its colours are the page's, its marks named."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from launcher.compare.figures import Titles
from launcher.reports.style import GREY, INK, PALE

_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
# What changes with the page between light and dark; the colours of methods are named by them.
_VARIABLES = {INK: "ink", GREY: "grey", PALE: "pale", "#ffffff": "paper"}


def svg(figure: Figure, titles: Titles, colors: dict[str, str], *, name: str, about: str) -> str:
    """The figure as an `<svg>` element; `about` describes it to those who cannot see it.

    Every mark in `titles` becomes `<g class="mark" data-index="…"><title>…`. `colors`: a colour of
    the figure → the CSS variable to take in its place. `name` keeps the ids of figures apart.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", _XLINK[1:-1])
    root = ElementTree.fromstring(buffer.getvalue())
    # matplotlib's own description, and a style sheet that would hold for the whole page.
    for child in (*root.findall(f"{_SVG}metadata"), *root.findall(f"{_SVG}defs")[:1]):
        root.remove(child)
    del root.attrib["width"], root.attrib["height"]
    root.attrib |= {"role": "img", "aria-label": about}
    _tell_ids_apart(root, name)
    for group in root.iter(f"{_SVG}g"):
        mark = titles.texts.get(group.attrib.pop("id", ""))
        if mark is not None:
            _name(group, *mark)
    return _themed(ElementTree.tostring(root, encoding="unicode"), colors)


def _name(group: ElementTree.Element, index: int, text: str) -> None:
    """Make a mark of it; thin lines get an invisible wide one that is easier to point at."""
    group.attrib |= {"class": "mark", "data-index": str(index)}
    title = ElementTree.Element(f"{_SVG}title")
    title.text = text
    for path in group.findall(f"{_SVG}path"):
        if "stroke:" in path.get("style", ""):
            wide = {**path.attrib, "class": "reach", "style": "fill: none"}
            group.append(ElementTree.Element(f"{_SVG}path", wide))
    group.insert(0, title)


def _tell_ids_apart(root: ElementTree.Element, name: str) -> None:
    """Ids are the page's, not the figure's: only those that something refers to stay."""
    for element in root.iter():
        for key in (f"{_XLINK}href", "clip-path"):
            if key in element.attrib:
                element.attrib[key] = element.attrib[key].replace("#", f"#{name}-")
    for element in root.iter():
        if element.tag != f"{_SVG}g" and "id" in element.attrib:
            element.attrib["id"] = f"{name}-{element.attrib['id']}"


def _themed(text: str, colors: dict[str, str]) -> str:
    # Fonts are the page's.
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    text = re.sub(r"font: ((?:\w+ )*)([\d.]+px) [^;\"]+", r"font-size: \2; font-weight: \1", text)
    for color, variable in (_VARIABLES | colors).items():
        text = re.sub(color, f"var(--{variable})", text, flags=re.IGNORECASE)
    return text
