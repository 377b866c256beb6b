"""What an average of the weights and a teacher give SCL: docs/training.md.

    python -m benchmarks.additions [--task digits] [--densities 10,5,2.5,1] [--splits 0-7] [--quick]

The loop, splits, recipes and settings of `benchmarks.front`, with the launcher's own average and
teacher. On each split a dense network is trained, which is the teacher, and SCL with the same
initial weights and order of images, without one and with it. An average belongs to the very
training of the network that it is compared with. A result is a line of
docs/figures/additions/<task>.csv; what has its lines is not trained again.

Printed are the differences in top-1 from SCL without any of it, split by split: means and standard
errors. The last line is a JSON object with all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.common import machine, table
from benchmarks.front import densities, numbers
from benchmarks.front_compare import shown, spread
from benchmarks.front_lines import Line, append, read
from benchmarks.front_runs import Run, line_of
from benchmarks.front_tasks import DENSITIES, TASKS, recipe_for
from benchmarks.front_training import Images, Loss, of_labels_alone, train
from data.shards.manifest import ImageStats
from launcher.errors import UserError
from launcher.recipe.distill import DistillConfig
from launcher.run.average import WeightAverage
from launcher.run.parameters import Parameters
from launcher.run.teacher import Teacher
from sclcore.network.connections import find_connections

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures" / "additions"
DECAYS = (0.9, 0.99, 0.999)
# Weight and temperature; a recipe's default first.
TEACHERS = ((0.5, 2.0), (0.9, 4.0))
_QUICK = ["optim.epochs=4"]


class Averages:
    """The averages of one training, one for each decay."""

    def __init__(self) -> None:
        self._kept: dict[float, WeightAverage] = {}

    def after_update(self, model: nn.Module) -> None:
        if self._kept:
            for average in self._kept.values():
                average.update()
            return
        masked = {connections.name for connections in find_connections(model)}
        self._kept = {decay: WeightAverage(Parameters(model), decay, masked) for decay in DECAYS}

    def in_turn(self) -> Iterator[float]:
        """Each decay, while the network that is trained is the average of it."""
        for decay, average in self._kept.items():
            with average.in_place():
                yield decay


def taught_by(network: nn.Module, of: Images, weight: float, temperature: float) -> Loss:
    """The loss with a teacher, which sees the student's images as they are."""
    channels = 3 if of.images.shape[1] == 3 else 1
    stats = ImageStats(channels=channels, mean=[0] * channels, std=[1] * channels, measured_on=1)
    config = DistillConfig(teacher="dense", weight=weight, temperature=temperature)
    teacher = Teacher(network, config, stats, stats)
    return lambda outputs, images, of_labels: teacher.loss(
        outputs, teacher.logits(images), of_labels
    )


def trained(run: Run, of: Images, loss: Loss | None = None) -> tuple[nn.Module, list[Line]]:
    """One training: its network, and the lines of this and of its averages."""
    averages, began = Averages(), time.perf_counter()
    model = train(run.recipe, of, run.split, averages.after_update, loss or of_labels_alone)
    seconds = time.perf_counter() - began
    lines = [line_of(run, model, of, seconds)]
    for decay in averages.in_turn():
        name = f"{run.name} ema {decay:g}"
        lines.append(line_of(replace(run, name=name), model, of, seconds))
    return model, lines


def carry_out(task: str, splits: list[int], asked: list[float], quick: bool, path: Path) -> None:
    """Train what has no line yet, and write its lines."""
    overrides = _QUICK if quick else []
    known = {line.key for line in read(path)}
    path.parent.mkdir(parents=True, exist_ok=True)

    def lines(run: Run, of: Images, loss: Loss | None = None) -> nn.Module:
        model, found = trained(run, of, loss)
        for line in found:
            append(path, line)
        return model

    for split in tqdm(splits, unit="split", desc=task):
        of = TASKS[task].images(split)
        dense = Run(task, "dense", 1.0, split, recipe_for(task, "dense", 1.0, overrides))
        teacher = None
        for density in asked:
            recipe = recipe_for(task, "scl", density, overrides)
            plain = Run(task, "scl", density, split, recipe)
            if plain.key not in known:
                lines(plain, of)
            for weight, temperature in TEACHERS:
                run = replace(plain, name=f"scl teacher {weight:g} {temperature:g}")
                if run.key in known:
                    continue
                teacher = lines(dense, of) if teacher is None else teacher
                lines(run, of, taught_by(teacher, of, weight, temperature))


def compared(lines: list[Line]) -> dict[str, Any]:
    """By density and name: top-1, and what it is more than SCL's on the same splits."""
    newest = {(line.asked, line.name, line.split): line for line in lines}
    found: dict[str, Any] = {}
    for asked in sorted({line.asked for line in lines}, reverse=True):
        names = dict.fromkeys(line.name for line in lines if line.asked == asked)
        for name in names:
            of_name = {s: line for (a, n, s), line in newest.items() if (a, n) == (asked, name)}
            base = {
                split: line.top1
                for (a, n, split), line in newest.items()
                if (a, n) == (asked, name.split()[0])
            }
            more = [line.top1 - base[split] for split, line in of_name.items() if split in base]
            found.setdefault(f"{100 * asked:g} %", {})[name] = {
                "top-1": spread(np.array([line.top1 for line in of_name.values()])),
                "density": float(np.mean([line.density for line in of_name.values()])),
                "more": spread(np.array(more)),
            }
    return found


def printed(found: dict[str, Any]) -> str:
    rows = [
        [name, asked, shown(row["top-1"]), f"{100 * row['density']:.2f} %", shown(row["more"])]
        for asked, of_density in found.items()
        for name, row in of_density.items()
    ]
    return table(["", "asked", "top-1", "density", "more than without"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), default="digits")
    parser.add_argument("--densities", type=densities, default=[*DENSITIES], help="in %%")
    parser.add_argument("--splits", type=numbers, default=[*range(8)], help="from-to, or numbers")
    parser.add_argument("--folder", type=Path, help=f"of the CSV files (default: {FOLDER})")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.splits, options.densities = options.splits[:2], options.densities[:1]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        # Four epochs are no result: they leave nothing behind.
        folder = options.folder or (Path(scratch) if options.quick else FOLDER)
        path = folder / f"{options.task}.csv"
        try:
            carry_out(options.task, options.splits, options.densities, options.quick, path)
            found = compared(read(path))
        except UserError as error:
            parser.error(str(error))
    print(f"\n{options.task}\n{printed(found)}")
    print(
        json.dumps(
            {
                "benchmark": "additions",
                "machine": machine(torch.device("cpu")),
                "details": {options.task: found},
            }
        )
    )


if __name__ == "__main__":
    main()
