"""The sweeps of recipes/compare_digits on many splits of the digits: docs/comparison.md.

    python docs/figures/comparison_splits.py [--splits 16] [--jobs 2]

A bare loop around the recipes' models, optimizers and schedules, in which a run takes about five
seconds of one core: sixteen splits take half an hour on two. Split k holds 450 digits back, drawn
by seed k, and is trained with seed k by every method, so that methods are compared split by split.

Then, why: for SCL and STR at two densities, the structure that was found is trained again from its
initial weights, as it is and with the first layer of the other method's.

Writes comparison_splits.csv and comparison_structures.csv beside itself, and from them
comparison_splits.png and three tables of the document, between their comments.
"""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.files import atomic_write
from docs.figures.comparison import put_table
from docs.figures.split_training import density, split, structure, top1, train
from launcher.compare.figures import accuracy_scale, figure_of, png, put_legend
from launcher.recipe.recipe import Recipe
from launcher.reports.style import GREY, PALE, bare, heading, look_of
from launcher.start.sweep import load_sweep, plan_sweep

_HERE = Path(__file__).resolve().parent
_RECIPES = _HERE.parents[1] / "recipes" / "compare_digits"
_FIRST = "features.0.weight"
# Runs of the first sweep whose structures are taken apart, in pairs of about one density.
_PAIRS = (
    ("scl-lam0.24", "str-s_weight_decay0.02"),
    ("scl-lam0.315", "str-s_weight_decay0.062"),
)

Result = dict[str, Any]
_SPLITS, _STRUCTURES = "comparison_splits.csv", "comparison_structures.csv"


@dataclass(frozen=True)
class Setting:
    """A configuration of a sweep: what its runs are called without their seed."""

    name: str
    recipe: Recipe
    first_is_dense: bool

    @property
    def method(self) -> str:
        return self.recipe.method.name

    @property
    def knob(self) -> str:
        return self.name.partition("-")[2].removeprefix("first-dense-")


def settings(file: str) -> list[Setting]:
    sweep = load_sweep(_RECIPES / file)
    runs = plan_sweep(sweep.model_copy(update={"seeds": [0]}), _RECIPES / file)
    return [
        Setting(
            run.name.removesuffix("-seed0"),
            run.recipe,
            bool(getattr(run.recipe.method, "exclude", [])),
        )
        for run in runs
    ]


def run(job: tuple[Setting, int]) -> Result:
    setting, number = job
    torch.set_num_threads(1)
    digits = split(number)
    model = train(setting.recipe, digits, number)
    masks = structure(model)
    return {
        "setting": setting.name,
        "split": number,
        "top1": top1(model, digits),
        "density": density(masks),
        "first_layer": density({_FIRST: masks[_FIRST]}),
    }


def take_apart(job: tuple[Setting, Setting, int]) -> Result:
    """Top-1 of structures, trained again from their initial weights."""
    ours, theirs, number = job
    torch.set_num_threads(1)
    digits = split(number)
    mine, others = (structure(train(s.recipe, digits, number)) for s in (ours, theirs))
    kinds = {
        "SCL's": mine,
        "STR's": others,
        "SCL's with STR's first layer": mine | {_FIRST: others[_FIRST]},
        "STR's with SCL's first layer": others | {_FIRST: mine[_FIRST]},
    }
    result: Result = {"setting": f"{ours.name}, {theirs.name}", "split": number}
    for kind, masks in kinds.items():
        result[kind] = top1(train(ours.recipe, digits, number, masks), digits)
        result[f"density: {kind}"] = density(masks)
    return result


def spread_table(found: list[Setting], results: list[Result]) -> str:
    rows = [
        "| method | setting | first layer | top-1 | density | density of the first layer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for setting, of_runs in _of_settings(found, results):
        columns = {key: _column(of_runs, key) for key in ("top1", "density", "first_layer")}
        cells = [
            setting.method,
            re.sub(r"(?=\d)", " ", setting.knob, count=1) or "–",
            "dense" if setting.first_is_dense else "learned",
            _mean_and_error(columns["top1"]),
            f"{100 * columns['density'].mean():.2f} %",
            f"{100 * columns['first_layer'].mean():.0f} %",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def gap_table(found: list[Setting], results: list[Result]) -> str:
    """SCL's top-1 less that of others at its density, between two densities of theirs."""
    others = [m for m in dict.fromkeys(s.method for s in found) if m not in ("dense", "scl")]
    rows = [
        f"| first layer | lam | density | {' | '.join(f'less {m}' for m in others)} |",
        "| --- | --- | --- |" + " --- |" * len(others),
    ]
    by_setting = _by_setting(results)
    for ours in (s for s in found if s.method == "scl"):
        mine = by_setting[ours.name]
        cells = [
            "dense" if ours.first_is_dense else "learned",
            ours.knob.removeprefix("lam"),
            f"{100 * _column(mine, 'density').mean():.2f} %",
        ]
        for method in others:
            theirs = [
                by_setting[s.name]
                for s in found
                if s.method == method and s.first_is_dense == ours.first_is_dense
            ]
            gaps = _gaps(mine, theirs)
            cells.append("–" if gaps is None else _mean_and_error(gaps, sign="+"))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _gaps(mine: list[Result], theirs: list[list[Result]]) -> np.ndarray | None:
    """Split by split, by interpolation over the logarithm of the density; never beyond its ends."""
    gaps = []
    for number, ours in enumerate(mine):
        around = sorted((float(r[number]["density"]), float(r[number]["top1"])) for r in theirs)
        at = float(ours["density"])
        if not around[0][0] <= at <= around[-1][0]:
            return None
        densities, top1s = zip(*around, strict=True)
        gaps.append(float(ours["top1"]) - np.interp(np.log(at), np.log(densities), top1s))
    return np.array(gaps)


def why_table(results: list[Result], apart: list[Result]) -> str:
    rows = [
        "| of the runs | structure, trained again | top-1 | density | difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    trained = _by_setting(results)
    for names, of_runs in _by_setting(apart).items():
        ours, theirs = (_column(trained[name], "top1") for name in names.split(", "))
        scl, soft = _column(of_runs, "SCL's"), _column(of_runs, "STR's")
        compared = {
            "SCL's": (ours, "as trained at first"),
            "STR's": (theirs, "as trained at first"),
            "SCL's with STR's first layer": (scl, "SCL's"),
            "STR's with SCL's first layer": (soft, "STR's"),
        }
        for kind, (base, words) in compared.items():
            top1s, densities = _column(of_runs, kind), _column(of_runs, f"density: {kind}")
            cells = [
                names,
                kind,
                _mean_and_error(top1s),
                f"{100 * densities.mean():.2f} %",
                f"{_mean_and_error(top1s - base, sign='+')} to {words}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
        gap = _mean_and_error(soft - scl, sign="+")
        rows.append(f"| {names} | | | | {gap}, STR's to SCL's, both again |")
    return "\n".join(rows)


def _by_setting(
    results: list[Result],
) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda r: int(r["split"])):
        groups[str(result["setting"])].append(result)
    return groups


def _column(results: list[Result], key: str) -> np.ndarray:
    return np.array([float(result[key]) for result in results])


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return values.std(ddof=1) / len(values) ** 0.5


def _mean_and_error(values: np.ndarray, sign: str = "") -> str:
    return f"{100 * values.mean():{sign}.2f} ± {100 * _error(values):.2f} %"


def draw(found: list[Setting], results: list[Result]) -> bytes:
    """Top-1 over density, with standard errors; the first layer learned, and dense."""
    figure, panels = figure_of(2, height=4.4)
    looks = look_of(list(dict.fromkeys(s.method for s in found)))
    points = {s.name: _point(of_runs) for s, of_runs in _of_settings(found, results)}
    for axes, first_is_dense in zip(panels, (False, True), strict=True):
        heading(axes, f"First layer {'left dense' if first_is_dense else 'learned'}")
        bare(axes, grid="y")
        accuracy_scale(axes, [(top1, error) for _, top1, error in points.values()])
        for method, (colour, marker) in looks.items():
            names = [
                s.name for s in found if s.method == method and s.first_is_dense == first_is_dense
            ]
            if not names:
                continue
            densities, top1s, errors = zip(*(points[name] for name in names), strict=True)
            if method == "dense":
                axes.axhspan(top1s[0] - errors[0], top1s[0] + errors[0], color=PALE)
                continue
            axes.errorbar(
                densities, top1s, errors, color=colour, marker=marker, label=method, capsize=3
            )
        axes.set_xscale("log")
        axes.set_xlim(0.022, 0.125)
        axes.set_xticks([0.025, 0.05, 0.1], ["2.5 %", "5 %", "10 %"])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("density of all layers together", color=GREY)
    put_legend(figure, panels[0].get_legend_handles_labels()[0], columns=5)
    return png(figure)


def _of_settings(
    found: list[Setting], results: list[Result]
) -> Iterator[tuple[Setting, list[Result]]]:
    by_setting = _by_setting(results)
    return ((setting, by_setting[setting.name]) for setting in found)


def _point(of_runs: list[Result]) -> tuple[float, float, float]:
    """Mean density, mean top-1 and its standard error."""
    top1s = _column(of_runs, "top1")
    return _column(of_runs, "density").mean(), top1s.mean(), _error(top1s)


def write_csv(name: str, results: list[Result]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(results[0]), lineterminator="\n")
    writer.writeheader()
    for result in sorted(results, key=lambda r: (str(r["setting"]), int(r["split"]))):
        writer.writerow({k: f"{v:.5f}" if isinstance(v, float) else v for k, v in result.items()})
    atomic_write(_HERE / name, text.getvalue())


def read_csv(name: str) -> list[Result]:
    return list(csv.DictReader((_HERE / name).read_text().splitlines()))


def train_all(found: list[Setting], splits: int, jobs: int) -> None:
    named = {setting.name: setting for setting in found}
    runs = [(s, number) for number in range(splits) for s in found]
    pairs = [(named[a], named[b], number) for number in range(splits) for a, b in _PAIRS]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        write_csv(_SPLITS, list(tqdm(pool.imap_unordered(run, runs), total=len(runs))))
        apart = list(tqdm(pool.imap_unordered(take_apart, pairs), total=len(pairs)))
        write_csv(_STRUCTURES, apart)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=16, help="splits of the digits (default: 16)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--draw-only", action="store_true", help="train nothing: tables and figure from the CSV"
    )
    options = parser.parse_args()
    found = [*settings("sweep.yaml"), *settings("first_layer.yaml")]
    if not options.draw_only:
        train_all(found, options.splits, options.jobs)
    results = read_csv(_SPLITS)
    put_table("docs/figures/comparison_splits.py", spread_table(found, results))
    put_table("at equal density, docs/figures/comparison_splits.py", gap_table(found, results))
    put_table(
        "structures, docs/figures/comparison_splits.py", why_table(results, read_csv(_STRUCTURES))
    )
    atomic_write(_HERE / "comparison_splits.png", draw(found, results))


if __name__ == "__main__":
    main()
