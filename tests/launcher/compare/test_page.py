"""The page that `scl compare` writes, looked at in a real browser."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.compare import compare_runs, write
from launcher.compare.page import page as html
from tests.launcher.compare.compared import Made, write_run
from tests.launcher.conftest import summary

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods, one of them with a name that HTML must not read, and a run under way."""
    root = tmp_path_factory.mktemp("runs")
    made = [
        Made("dense-seed0", {"name": "dense"}, 0, 0.985, 1.0),
        Made("dense-seed1", {"name": "dense"}, 1, 0.991, 1.0),
        Made("scl-strong-seed0", {"name": "scl", "lam": 0.4}, 0, 0.951, 0.021),
        Made("scl-strong-seed1", {"name": "scl", "lam": 0.4}, 1, 0.957, 0.019),
        Made("magnitude", {"name": "magnitude", "density": 0.1}, 0, 0.949, 0.1),
        Made("young", {"name": "scl", "lam": 0.1}, 0, 0.97, 0.3, stopped_at=3),
    ]
    for one in made:
        write_run(root / one.name, one)
    return root


@pytest.fixture(scope="module")
def page_file(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(compare_runs([runs]), tmp_path_factory.mktemp("out"))[-1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, page_file: Path) -> Iterator[Any]:
    """The page as opened from the disk; whatever it complains of or asks for fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    complaints, requests = [], []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(page_file.as_uri())
    yield opened
    context.close()
    assert complaints == []
    assert requests == [page_file.as_uri()]


def _rows(page: Any, table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in row.locator("td").all_text_contents()]
        for row in page.locator(f"#{table} tbody tr").all()
    ]


def test_every_run_is_there_with_the_numbers_of_its_summary(page: Any, runs: Path) -> None:
    page.locator("summary").click()
    rows = {row[0]: row for row in _rows(page, "runs")}
    assert len(rows) == 6 and rows["young"][-2] == "epoch 3 of 8"
    for folder in runs.iterdir():
        if folder.name == "young":
            continue
        said = summary(folder)
        shown = [float(text) for text in rows[folder.name][2:7]]
        keys = ("top1", "density", "live", "macs", "train_seconds")
        assert shown == pytest.approx([said[key] for key in keys], rel=1e-9)
        assert rows[folder.name][-1] == str(folder)


def test_the_table_holds_means_and_deviations(page: Any) -> None:
    rows = {row[0]: row for row in _rows(page, "configurations")}
    assert list(rows) == ["dense", "magnitude", "scl-strong", "young"]
    assert rows["dense"][1:4] == ["dense", "98.80 ± 0.42 %", "100 ± 0 %"]
    assert rows["scl-strong"][2] == "95.40 ± 0.42 %"
    assert rows["scl-strong"][-2:] == ["0, 1", "both"]
    assert rows["magnitude"][-2:] == ["0", ""]
    assert rows["young"][-2:] == ["0 (epoch 3 of 8)", ""]
    assert _rows(page, "differences")[2] == ["scl-strong", "scl", "0.4"]


def test_a_click_on_a_heading_sorts(page: Any) -> None:
    def names() -> list[str]:
        return [row[0] for row in _rows(page, "configurations")]

    heading = page.locator("#configurations th", has_text="top-1")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert names() == ["young", "magnitude", "scl-strong", "dense"]
    heading.locator("button").click()
    assert names() == ["dense", "scl-strong", "magnitude", "young"]
    # What is missing comes last, either way.
    macs = page.locator("#configurations th", has_text="MACs").locator("button")
    macs.click()
    assert names() == ["scl-strong", "magnitude", "dense", "young"]
    macs.click()
    assert names() == ["dense", "magnitude", "scl-strong", "young"]
    page.locator("#configurations th", has_text="method").locator("button").click()
    assert names() == ["dense", "magnitude", "scl-strong", "young"]


def test_figures_are_drawn_and_not_blank(page: Any) -> None:
    figures = page.locator("svg")
    assert figures.count() == 6
    for figure in figures.all():
        box = figure.bounding_box()
        assert box["width"] > 250 and box["height"] > 100
        with Image.open(io.BytesIO(figure.screenshot())) as image:
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    words = " ".join(page.locator("svg text").all_text_contents())
    for expected in ("Top-1 accuracy over density", "Density per layer", "conv2", "100 %"):
        assert expected in words


def test_pointing_at_a_point_names_its_run_and_shows_it_everywhere(page: Any) -> None:
    tip = page.locator(".tip")
    assert not tip.is_visible()
    # The points, not their bars; in the order of the table.
    points = page.locator("svg").first.locator(".mark:has(use)")
    points.filter(has=page.locator("g use")).last.locator("use").last.hover()
    assert tip.text_content().startswith("young: top-1 ")
    assert "(epoch 3 of 8)" in tip.text_content()
    assert page.locator("#configurations tr.hot td").first.text_content() == "young"
    hot = page.locator(".mark.hot").evaluate_all("marks => marks.map(m => m.dataset.index)")
    assert len(hot) >= 4 and set(hot) == {"3"}
    # Not page.wait_for_function: it evaluates a string, which the page's policy forbids.
    from playwright.sync_api import expect

    expect(page.locator(".mark:not(.hot)").first).to_have_css("opacity", "0.15")
    page.locator("#configurations tbody tr").first.hover()
    assert not tip.is_visible()
    assert page.locator(".mark.hot").first.get_attribute("data-index") == "0"
    page.locator("h1").hover()
    assert page.locator(".hot").count() == 0


@pytest.mark.parametrize("width", [340, 390, 768, 1600])
def test_no_width_makes_the_page_overflow(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.locator("svg text").evaluate_all(
        "texts => texts.map(t => t.getBoundingClientRect().height).filter(height => height > 0)"
    )
    assert len(sizes) > 50 and min(sizes) >= 8


def test_light_and_dark(browser: Any, page_file: Path) -> None:
    papers = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, viewport={"width": 900, "height": 900})
        opened = context.new_page()
        opened.goto(page_file.as_uri())
        with Image.open(io.BytesIO(opened.screenshot())) as image:
            colors = sorted(image.convert("RGB").getcolors(1 << 24) or [], reverse=True)
        papers[scheme] = sum(colors[0][1])  # type: ignore[arg-type]
        ink = opened.locator("svg text").first.evaluate("text => getComputedStyle(text).fill")
        brightness = sum(map(int, re.findall(r"\d+", ink)[:3]))
        assert abs(brightness - papers[scheme]) > 200, "text must stand out from the paper"
        context.close()
    assert papers["light"] > 3 * 240 and papers["dark"] < 3 * 60


def test_names_are_text_not_html(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Made("run"))
    said = summary(run) | {"name": "<img src=x onerror=alert(1)> & $x"}
    (run / "summary.json").write_text(json.dumps(said))
    file = tmp_path / "index.html"
    file.write_text(html(compare_runs([run])))
    opened = browser.new_page()
    opened.goto(file.as_uri())
    assert opened.locator("#configurations td").first.text_content() == said["name"]
    assert opened.locator("img").count() == 0
    opened.close()
