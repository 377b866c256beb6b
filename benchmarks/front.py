"""SCL against other methods at equal density, split by split: docs/comparison.md.

    python -m benchmarks.front [--task digits] [--methods scl,magnitude] [--jobs 2] [--quick]
    python -m benchmarks.front --methods scl --set scl.mask_lr=0.002 --name slow

A bare loop around the models, optimizers and schedules of recipes: every method has the same split,
initial weights, order of images and epochs. A run is a line of docs/figures/front/<task>.csv, which
is written when it ends; a run whose line exists is not made again, so that a killed benchmark goes
on where it was. SCL is told the density alone. `--set METHOD.KEY=VALUE` changes a setting of a
method (METHOD.schedule.KEY and METHOD.optim.KEY those of its recipe); such runs are a variant, with
a name of its own.

The last line is a JSON object: for each task and density the top-1 of SCL, and of its variants,
less that of each rival, with the standard error of the paired differences, in points. A rival that
has another density than SCL on a split is read off between two of its own densities, linearly in
the logarithm, and beyond the last of them only where it is as good as the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.common import machine
from benchmarks.front_compare import compared, means
from benchmarks.front_lines import read
from benchmarks.front_runs import Run, carry_out
from benchmarks.front_tasks import (
    DENSITIES,
    METHODS,
    TASKS,
    densities_of,
    methods_of,
    recipe_for,
)
from launcher.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures" / "front"
# So few updates move masks only if each moves them far.
_QUICK = {"scl": ["optim.epochs=4", "mask_lr=0.016"]}


def plan(options: argparse.Namespace) -> list[Run]:
    """All runs that were asked for, split by split. Raises UsageError."""
    overrides: dict[str, list[str]] = defaultdict(list)
    for text in options.set:
        method, _, rest = text.partition(".")
        overrides[method].append(rest)
    for task in options.task:
        # Refused here if it is not packed, and kept in memory.
        TASKS[task].images(options.splits[0])
    runs = []
    for split in options.splits:
        for task in options.task:
            for method in options.methods or methods_of(task):
                changed = overrides[method]
                variant = options.name or " ".join(changed)
                name = f"{method} {variant}" if changed else method
                short = _QUICK.get(method, ["optim.epochs=4"]) if options.quick else []
                for asked in densities_of(method, options.densities):
                    recipe = recipe_for(task, method, asked, [*changed, *short])
                    runs.append(Run(task, name, asked, split, recipe, options.compile))
    return runs


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=["digits"])
    parser.add_argument(
        "--methods",
        type=lambda text: text.split(","),
        default=[],
        help=f"with commas between them, of {','.join(METHODS)} (default: all that a task has "
        "settings for)",
    )
    parser.add_argument(
        "--densities",
        type=densities,
        default=[*DENSITIES],
        help="in %%, with commas between them (default: 10,5,2.5,1)",
    )
    parser.add_argument(
        "--splits",
        type=numbers,
        default=[*range(8)],
        help="numbers with commas between them, or from-to (default: 0-7)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="METHOD.KEY=VALUE", help="a variant"
    )
    parser.add_argument("--name", help="what the variant is called (default: what is set)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: half the time, other rounding"
    )
    parser.add_argument("--folder", type=Path, help=f"of the CSV files (default: {FOLDER})")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    options = parser.parse_args()
    for method in options.methods:
        if method not in METHODS:
            parser.error(f"--methods: {method!r} is none of {', '.join(METHODS)}")
    for text in options.set:
        method = text.partition(".")[0]
        if method not in METHODS or method not in (options.methods or METHODS) or "=" not in text:
            parser.error(
                f"--set {text}: write it as METHOD.KEY=VALUE, such as scl.mask_lr=0.002, with a "
                "method of --methods"
            )
    if options.quick:
        options.splits, options.densities = options.splits[:2], options.densities[:2]
    return options


def densities(text: str) -> list[float]:
    """Shares, of percent with commas between them."""
    return [float(part) / 100 for part in text.split(",")]


def numbers(text: str) -> list[int]:
    """Such as 0-7 or 1,3,5."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options = options_of(parser)
    try:
        runs = plan(options)
        with tempfile.TemporaryDirectory() as scratch:
            # Four epochs are no result: they leave nothing behind.
            folder = options.folder or (Path(scratch) if options.quick else FOLDER)
            carry_out(runs, options.jobs, folder)
            lines = {task: read(folder / f"{task}.csv") for task in options.task}
    except UserError as error:
        parser.error(str(error))
    for task, of_task in lines.items():
        print(f"\n{task}\n{means(of_task)}")
    print(
        json.dumps(
            {
                "benchmark": "front",
                "machine": machine(torch.device("cpu")),
                "details": {task: compared(of_task) for task, of_task in lines.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
