"""The comparison as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.resources
from collections.abc import Iterable, Sequence
from html import escape
from string import Template

from launcher.compare.configurations import Comparison, Configuration
from launcher.compare.courses import MOST_NAMES, PANELS, draw_courses, strengths_of
from launcher.compare.figures import WORDS, Titles, draw_accuracy, figure_of, looks
from launcher.compare.layers import layers, sparse
from launcher.compare.svg import svg
from launcher.compare.table import Column, columns, differences_grid, front_of, headline, shown
from launcher.reports.style import GREY, INK

_SIGNS = {
    "o": "●",
    "D": "◆",
    "s": "■",
    "^": "▲",
    "v": "▼",
    "P": "✚",
    "X": "✖",
    "*": "★",
    "<": "◀",
    ">": "▶",
    "d": "♦",
    "p": "⬟",
    "h": "⬢",
    "8": "⯃",
    "H": "⬣",
}


def page(comparison: Comparison) -> str:
    """The whole HTML file."""
    about = _about(comparison)
    template = importlib.resources.files(__name__.rpartition(".")[0]).joinpath("page.html")
    version = importlib.metadata.version("scl-train")
    colors = {color for color, _ in looks(comparison).values()} - {INK, GREY}
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(headline(comparison)),
        about=escape(about),
        warnings=_warnings(comparison.warnings),
        light=" ".join(f"--{_variable(color)}: {color};" for color in sorted(colors)),
        dark=" ".join(f"--{_variable(color)}: {_on_dark(color)};" for color in sorted(colors)),
        body="\n".join(
            (
                _accuracy(comparison),
                _table(comparison),
                _courses(comparison),
                _layers(comparison),
                _differences(comparison),
                _runs(comparison),
            )
        ),
        footer=f"Written by scl compare, version {escape(version)}.",
    )


def _on_dark(color: str) -> str:
    """A method's colour on a dark page: two fifths of the way to white."""
    levels = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{level + (255 - level) * 2 // 5:02x}" for level in levels)


def _about(comparison: Comparison) -> str:
    """What all runs share, and the day."""
    parts = []
    for key, word in (("model.name", ""), ("data.path", "on "), ("optim.epochs", "")):
        values = {c.settings.get(key) for c in comparison.configurations}
        if len(values) == 1 and (value := values.pop()) is not None:
            parts.append(f"{word}{value}{' epochs' if key == 'optim.epochs' else ''}")
    today = datetime.date.today()
    return " · ".join([*parts, f"compared on {today.day} {today:%B %Y}"])


def _warnings(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text[0].upper() + text[1:])}.</li>" for text in warnings)
    return f'<ul class="warnings">{items}</ul>' if items else ""


def _variable(color: str) -> str:
    return f"c{color[1:]}"


def _css(color: str) -> str:
    """The colour in the page, light or dark."""
    return {INK: "var(--ink)", GREY: "var(--grey)"}.get(color, f"var(--{_variable(color)})")


def _replaced(comparison: Comparison) -> dict[str, str]:
    return {
        color: _variable(color)
        for color, _ in looks(comparison).values()
        if color not in (INK, GREY)
    }


def _accuracy(comparison: Comparison) -> str:
    pictures = []
    for cost in comparison.costs:
        titles = Titles()
        figure, [axes] = figure_of(1, width=5.0, height=3.7)
        draw_accuracy(axes, comparison, cost, titles)
        about = f"Top-1 accuracy over {WORDS[cost]}; the table below holds the numbers"
        pictures.append(svg(figure, titles, _replaced(comparison), name=cost, about=about))
    keys = [
        f'<li><i style="color: {_css(color)}">{_SIGNS.get(marker, "●")}</i>{escape(method)}</li>'
        for method, (color, marker) in looks(comparison).items()
    ]
    if any(not c.finished for c in comparison.configurations):
        keys.append("<li><i>○</i>unfinished</li>")
    keys.append('<li><i class="line front"></i>Pareto front</li>')
    measured = "milliseconds" in comparison.costs
    latency = ", and how long one takes in the native runtime here" if measured else ""
    caption = (
        "<b>Figure 1.</b> Accuracy against what the network costs: its share of connections, and "
        f"the multiply-accumulates of one forward pass{latency}. Points are means over seeds, bars "
        "one sample standard deviation. No run at hand lies above the dashed front."
    )
    return _figure(f'<div class="panels">{"".join(pictures)}</div>{_keys(keys)}', caption)


def _courses(comparison: Comparison) -> str:
    pictures = []
    for panel in PANELS:
        titles = Titles()
        figure, [axes] = figure_of(1, width=3.8, height=3.2)
        draw_courses(axes, comparison, panel, titles)
        about = f"{panel.heading} over epochs"
        pictures.append(svg(figure, titles, _replaced(comparison), name=panel.key, about=about))
    caption = (
        "<b>Figure 2.</b> Accuracy, density and training loss over epochs: means over seeds, in "
        "bands of one sample standard deviation. Of one method, the fainter line is the denser."
    )
    return _figure(
        f'<div class="panels">{"".join(pictures)}</div>{_keys(_course_keys(comparison))}', caption
    )


def _course_keys(comparison: Comparison) -> list[str]:
    colors = looks(comparison)
    if len(comparison.configurations) > MOST_NAMES:
        return [
            f'<li><i class="line" style="color: {_css(color)}"></i>{escape(method)}</li>'
            for method, (color, _) in colors.items()
        ]
    return [
        f'<li data-index="{index}"><i class="line" style="color: {_css(colors[c.method][0])}; '
        f'opacity: {strength:.2f}"></i>{escape(c.name)}</li>'
        for index, (c, strength) in enumerate(
            zip(comparison.configurations, strengths_of(comparison), strict=True)
        )
    ]


def _layers(comparison: Comparison) -> str:
    if not sparse(comparison):
        return ""
    titles = Titles()
    figure = layers(comparison, titles)
    picture = svg(
        figure, titles, _replaced(comparison), name="layers", about="Density of every layer"
    )
    caption = (
        "<b>Figure 3.</b> Live share of each layer's connections, means over seeds. Networks that "
        "kept all of them are left out."
    )
    return _figure(f'<div class="scroll">{picture}</div>', caption)


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def _keys(items: Iterable[str]) -> str:
    return f'<ul class="keys">{"".join(items)}</ul>'


def _table(comparison: Comparison) -> str:
    headings: list[tuple[str, str | None]] = [("configuration", None), ("method", None)]
    headings += [(column.title, column.meaning) for column in columns(comparison)]
    headings += [("seeds", None), ("front", "the Pareto fronts it is on")]
    rows = [
        _line(c, index, front_of(comparison, index), columns(comparison))
        for index, c in enumerate(comparison.configurations)
    ]
    caption = (
        "<b>Table 1.</b> Means over seeds ± one sample standard deviation. A click on a heading "
        "sorts."
    )
    return _sortable("configurations", caption, headings, rows)


def _line(c: Configuration, index: int, front: str, columns: Sequence[Column]) -> str:
    cells = [_cell(c.name), _cell(c.method, kind="word")]
    for column in columns:
        stat = c.stat(column.key)
        cells.append(_cell(shown(stat, column.key), "" if stat is None else repr(stat.mean)))
    seeds = f"{c.seeds} ({c.state})" if c.state else c.seeds
    cells += [_cell(seeds, kind="word"), _cell(front, kind="word")]
    return _element("tr", "".join(cells), data_index=index, class_=None if c.finished else "open")


def _differences(comparison: Comparison) -> str:
    if not comparison.differences:
        return ""
    heading, *rows = differences_grid(comparison)
    body = [_element("tr", "".join(map(_cell, row))) for row in rows]
    caption = "<b>Table 2.</b> The keys of the recipes that differ; – where there is none."
    return _sortable("differences", caption, [(text, None) for text in heading], body)


def _runs(comparison: Comparison) -> str:
    titles = {column.key: column.title for column in columns(comparison)}
    headings = [(text, None) for text in ("run", "seed", *titles.values(), "state", "place")]
    rows = []
    for index, c in enumerate(comparison.configurations):
        for run in (*c.runs, *c.unfinished):
            values = [run.value(key) for key in titles]
            cells = [_cell(run.name), _cell("–" if run.seed is None else str(run.seed))]
            cells += [_cell("–", "") if v is None else _cell(f"{v:.10g}", repr(v)) for v in values]
            cells += [_cell(run.state(), kind="word"), _cell(run.place, kind="word")]
            rows.append(_element("tr", "".join(cells), data_index=index))
    table = _sortable("runs", "", headings, rows)
    return _element("details", f"<summary><b>Every run.</b></summary>{table}")


def _sortable(
    name: str, caption: str, headings: Iterable[tuple[str, str | None]], rows: Iterable[str]
) -> str:
    heads = "".join(
        _element("th", f"<button>{escape(text)}</button>", title=meaning)
        for text, meaning in headings
    )
    head = _element("thead", _element("tr", heads))
    table = _element("table", head + _element("tbody", "".join(rows)), id=name)
    above = _element("figcaption", caption) if caption else ""
    return _element("figure", above + _element("div", table, class_="scroll"), class_="table")


def _cell(text: str, value: str | None = None, *, kind: str | None = None) -> str:
    """`value` is what it is sorted by, if not its text."""
    return _element("td", escape(text), class_=kind, data_value=value)


def _element(tag: str, content: str, **attributes: str | int | None) -> str:
    """`content` is HTML already; `class_` and `data_index` are class and data-index."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{content}</{tag}>"
