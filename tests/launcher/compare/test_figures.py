from __future__ import annotations

import json
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from launcher.compare import compare_runs
from launcher.compare.courses import PANELS, band_of, courses
from launcher.compare.figures import accuracy
from launcher.compare.layers import layers
from launcher.compare.series import series_of
from launcher.reports.style import look_of
from tests.launcher.compare.compared import DEEP, DENSE, SMALL, Made, scl, write_run, write_sweep


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("runs"))


def _words(figure: Any) -> list[Any]:
    figure.canvas.draw()
    found = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes._left_title, axes.xaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    return [text for text in found if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("draw", [accuracy, courses, layers])
@pytest.mark.parametrize(
    ("deep", "name"),
    [(False, "run_with_a_name"), (True, "run_with_a_name"), (False, "a_long_sweep-normalize" * 4)],
)
def test_no_text_overlaps_or_leaves_the_figure(
    tmp_path: Path, draw: Any, deep: bool, name: str
) -> None:
    network = DEEP if deep else SMALL
    for i in range(7 if deep else 2):
        density = 0.3 / (i + 1) ** 2
        made = Made(f"{name}-{i}", scl(0.1 * (i + 1)), density=density, layers=network)
        write_run(tmp_path / str(i), made)
    write_run(tmp_path / "dense", Made("_dense", DENSE, density=1.0, layers=network))
    figure = draw(compare_runs([tmp_path]))
    words = _words(figure)
    turned = [text for text in words if text.get_rotation()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in words if text not in turned]
    width, height = figure.canvas.get_width_height()
    for word, box in [*boxes, *((text.get_text(), text.get_window_extent()) for text in turned)]:
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, word
    clashes = [
        (one, other)
        for (one, a), (other, b) in combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 0 and min(a.y1, b.y1) - max(a.y0, b.y0) > 3
    ]
    assert clashes == []


def test_a_name_is_shown_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path / "a", Made("_a"))
    path = tmp_path / "a" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "_cost $_{$"}))
    assert "_cost $_{$" in [text.get_text() for text in _words(courses(compare_runs([tmp_path])))]


def test_points_bars_and_front_are_where_the_numbers_are(runs: Path) -> None:
    comparison = compare_runs([runs])
    axes: Any = accuracy(comparison).axes[0]
    assert axes.get_xscale() == "log"
    points = [line.get_xydata()[0] for line in axes.get_lines() if line.get_marker() in {"o", "D"}]
    for c in comparison.configurations:
        assert any(x == c.mean("density") and y == c.mean("top1") for x, y in points)
    bars = [tuple(bar.get_segments()[0].ravel()) for bar in axes.collections]
    c = comparison.configurations[2]
    x, y = c.stat("density"), c.stat("top1")
    assert x and y and x.std and y.std
    assert pytest.approx((x.mean, y.mean - y.std, x.mean, y.mean + y.std)) in bars
    [front] = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert list(front.get_xdata())[:-1] == [
        comparison.configurations[i].mean("density") for i in (2, 1, 0)
    ]


def test_a_line_joins_runs_that_differ_in_lam_alone(tmp_path: Path) -> None:
    for place, made in enumerate(
        [
            Made("a", scl(0.1), density=0.3),
            Made("b", scl(0.2), density=0.2, data="elsewhere/the/same"),
            Made("c", scl(0.3), density=0.1, epochs=16),
            Made("d", scl(0.4, mask_lr=0.01), density=0.05),
            Made("e", scl(0.3, target_density=0.04), density=0.04),
            Made("f", scl(0.3, target_density=0.02), density=0.02),
        ]
    ):
        write_run(tmp_path / str(place), made)
    comparison = compare_runs([tmp_path])
    joined = [{c.name for c in series} for series in series_of(comparison.configurations)]
    assert sorted(map(sorted, joined)) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    axes: Any = accuracy(comparison).axes[0]
    lines = [line for line in axes.get_lines() if line.get_alpha() and line.get_linestyle() == "-"]
    sizes = [len(line.get_xdata()) for line in lines if line.get_marker() == "None"]
    assert sorted(size for size in sizes if size > 1) == [2, 2]


def test_bands_are_means_and_deviations_over_seeds(runs: Path) -> None:
    c = compare_runs([runs]).configurations[2]
    band = band_of(c, PANELS[0])
    assert band is not None and band.epochs == list(range(1, 9))
    values = [run.run.series("val/top1")[1][-1] for run in c.runs]
    assert band.mean[-1] == pytest.approx(statistics.fmean(values))
    assert band.std[-1] == pytest.approx(statistics.stdev(values))


def test_seeds_that_end_at_different_epochs_are_compared_as_far_as_both_go(tmp_path: Path) -> None:
    for seed, stop in ((0, 5), (1, 2)):
        write_run(tmp_path / str(seed), Made("x", seed=seed, stopped_at=stop))
    write_run(tmp_path / "dense", Made("dense", DENSE, density=1.0))
    band = band_of(compare_runs([tmp_path]).configurations[1], PANELS[1])
    assert band is not None and band.epochs[-1] == 2.0


def test_methods_keep_their_look() -> None:
    assert look_of(["scl", "mine"])["scl"] == look_of(["dense", "scl"])["scl"]
    every = look_of(["dense", "scl", "magnitude", "rigl", "str", "one", "two", "three"])
    assert len(set(every.values())) == 8
    assert len({marker for _, marker in every.values()}) == 8
