"""The sweeps of recipes/compare_digits on many splits of the digits: docs/comparison.md.

    python docs/figures/comparison_splits.py [--splits 16] [--jobs 2]

A bare loop around the recipes' models, optimizers and schedules, in which a run takes about five
seconds of one core: sixteen splits take 20 minutes on two. Split k holds 450 digits back, drawn by
seed k, and is trained with seed k by every method, so that methods can be compared split by split.

Then, why: for SCL and STR at two densities, the structure that was found is trained again from its
initial weights, from others, and with the first layer's structure of the other method.

Writes comparison_splits.csv and comparison_splits.png beside itself, and two tables into the
document, between their comments.
"""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.defaults import shifted
from docs.figures.comparison import put_table
from launcher.compare.figures import figure_of, png, put_legend
from launcher.files import atomic_write
from launcher.models import create_model
from launcher.recipe import Recipe
from launcher.style import GREY, PALE, accuracy_axis, bare, heading, look_of
from launcher.sweep import load_sweep, plan_sweep
from sclcore import Scheduler

_HERE = Path(__file__).resolve().parent
_RECIPES = _HERE.parents[1] / "recipes" / "compare_digits"
_HELD_BACK = 450
_FIRST = "features.0.weight"
# Runs of the first sweep whose structures are taken apart, in pairs of about one density.
_PAIRS = (
    ("scl-lam0.24", "str-s_weight_decay0.02"),
    ("scl-lam0.315", "str-s_weight_decay0.062"),
)

Masks = dict[str, Tensor]


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


@dataclass(frozen=True)
class Digits:
    """One split: standardised images [N, 1, 8, 8], labels [N], and which are trained on."""

    images: Tensor
    labels: Tensor
    train: Tensor
    held_back: Tensor


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


def split(number: int) -> Digits:
    stored: Any = load_digits()
    images = torch.tensor(stored.images, dtype=torch.float32)[:, None]
    order = torch.from_numpy(np.random.default_rng(number).permutation(len(images)))
    train = order[_HELD_BACK:]
    images = (images - images[train].mean()) / images[train].std()
    return Digits(images, torch.tensor(stored.target), train, order[:_HELD_BACK])


def train(recipe: Recipe, digits: Digits, seed: int, masks: Masks | None = None) -> nn.Module:
    """The network at the end; with `masks`, trained densely but for the connections they lack."""
    torch.manual_seed(seed)
    model = create_model(recipe.model, num_classes=10, in_chans=1)
    method = recipe.method if masks is None else _dense().method
    optimizer = method.optimizer(model, recipe.optim, torch.empty(1, 1, 8, 8))
    scheduler = Scheduler(optimizer, recipe.schedule)
    generator = torch.Generator().manual_seed(seed)
    batch = recipe.optim.global_batch_size
    steps = len(digits.train) // batch
    _apply(masks, model)
    for epoch in range(recipe.optim.epochs):
        order = digits.train[torch.randperm(len(digits.train), generator=generator)]
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            scheduler.set_progress((epoch + step / steps) / recipe.optim.epochs)
            optimizer.zero_grad()
            images = shifted(digits.images[chosen], generator)
            cross_entropy(model(images), digits.labels[chosen]).backward()
            optimizer.step()
            _apply(masks, model)
    return model


def _dense() -> Recipe:
    return next(s.recipe for s in settings("sweep.yaml") if s.method == "dense")


@torch.no_grad()
def _apply(masks: Masks | None, model: nn.Module) -> None:
    for name, mask in (masks or {}).items():
        model.get_parameter(name).mul_(mask)


@torch.no_grad()
def top1(model: nn.Module, digits: Digits) -> float:
    model.eval()
    found = model(digits.images[digits.held_back]).argmax(1)
    return float((found == digits.labels[digits.held_back]).float().mean())


def structure(model: nn.Module) -> Masks:
    """Which weights of convolutions and linear layers are not 0."""
    return {name: p.detach() != 0 for name, p in model.named_parameters() if p.dim() > 1}


def density(masks: Masks) -> float:
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


def run(job: tuple[Setting, int]) -> dict[str, float | str]:
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


def take_apart(job: tuple[Setting, Setting, int]) -> dict[str, float | str]:
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
    result: dict[str, float | str] = {"setting": f"{ours.name}, {theirs.name}", "split": number}
    for kind, masks in kinds.items():
        result[kind] = top1(train(ours.recipe, digits, number, masks), digits)
        result[f"density: {kind}"] = density(masks)
    return result


def spread_table(found: list[Setting], results: list[dict[str, float | str]]) -> str:
    rows = [
        "| method | setting | first layer | top-1 | density | density of the first layer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    by_setting = _by_setting(results)
    for setting in found:
        of_runs = by_setting[setting.name]
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


def why_table(results: list[dict[str, float | str]]) -> str:
    rows = [
        "| of the runs | structure, trained again | top-1 | density | difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, of_runs in _by_setting(results).items():
        for kind in [key for key in of_runs[0] if f"density: {key}" in of_runs[0]]:
            top1s, densities = _column(of_runs, kind), _column(of_runs, f"density: {kind}")
            base = "SCL's" if kind == "STR's" else kind.partition(" with ")[0]
            change = _mean_and_error(top1s - _column(of_runs, base), sign="+")
            cells = [
                name,
                kind,
                _mean_and_error(top1s),
                f"{100 * densities.mean():.2f} %",
                "–" if kind == base else f"{change} to {base}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _by_setting(
    results: list[dict[str, float | str]],
) -> dict[str, list[dict[str, float | str]]]:
    groups: dict[str, list[dict[str, float | str]]] = defaultdict(list)
    for result in sorted(results, key=lambda r: int(r["split"])):
        groups[str(result["setting"])].append(result)
    return groups


def _column(results: list[dict[str, float | str]], key: str) -> np.ndarray:
    return np.array([float(result[key]) for result in results])


def _mean_and_error(values: np.ndarray, sign: str = "") -> str:
    """Mean and its standard error, in per cent."""
    error = values.std(ddof=1) / len(values) ** 0.5
    return f"{100 * values.mean():{sign}.2f} ± {100 * error:.2f} %"


def draw(found: list[Setting], results: list[dict[str, float | str]]) -> bytes:
    """Top-1 over density, with standard errors; the first layer learned, and dense."""
    figure, panels = figure_of(2)
    looks = look_of(list(dict.fromkeys(s.method for s in found)))
    by_setting = _by_setting(results)
    shown: list[float] = []
    for axes, first_is_dense in zip(panels, (False, True), strict=True):
        words = "left dense" if first_is_dense else "learned like the others"
        heading(axes, f"First layer {words}")
        bare(axes, grid="y")
        for method, (colour, marker) in looks.items():
            runs = [
                by_setting[s.name]
                for s in found
                if s.method == method and s.first_is_dense == first_is_dense
            ]
            if not runs:
                continue
            accuracies = np.array([_column(r, "top1") for r in runs])
            densities = [_column(r, "density").mean() for r in runs]
            errors = accuracies.std(1, ddof=1) / accuracies.shape[1] ** 0.5
            means = accuracies.mean(1)
            if method == "dense":
                axes.axhspan(means[0] - errors[0], means[0] + errors[0], color=PALE)
                continue
            axes.errorbar(
                densities, means, errors, color=colour, marker=marker, label=method, capsize=3
            )
            shown += [*(means - errors), *(means + errors)]
        axes.set_xscale("log")
        axes.set_xticks([0.025, 0.05, 0.1], ["2.5 %", "5 %", "10 %"])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("density", color=GREY)
    for axes in panels:
        accuracy_axis(axes, shown)
    put_legend(figure, panels[0].get_legend_handles_labels()[0], columns=5)
    return png(figure)


def write_csv(name: str, results: list[dict[str, float | str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(results[0]), lineterminator="\n")
    writer.writeheader()
    for result in sorted(results, key=lambda r: (str(r["setting"]), int(r["split"]))):
        writer.writerow({k: f"{v:.5f}" if isinstance(v, float) else v for k, v in result.items()})
    atomic_write(_HERE / name, text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=16, help="splits of the digits (default: 16)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args()
    found = [*settings("sweep.yaml"), *settings("first_layer.yaml")]
    named = {setting.name: setting for setting in found}
    jobs = [(s, number) for number in range(options.splits) for s in found]
    pairs = [(named[a], named[b], n) for n in range(options.splits) for a, b in _PAIRS]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        results = list(tqdm(pool.imap_unordered(run, jobs), total=len(jobs)))
        apart = list(tqdm(pool.imap_unordered(take_apart, pairs), total=len(pairs)))
    write_csv("comparison_splits.csv", results)
    write_csv("comparison_structures.csv", apart)
    put_table("docs/figures/comparison_splits.py", spread_table(found, results))
    put_table("structures, docs/figures/comparison_splits.py", why_table(apart))
    atomic_write(_HERE / "comparison_splits.png", draw(found, results))


if __name__ == "__main__":
    main()
