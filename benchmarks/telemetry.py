"""What it costs to watch masks being learned: step time with telemetry ÷ without.

    python -m benchmarks.telemetry [--device cpu|cuda] [--quick]

Trains scikit-learn's digits through the launcher as `scl train` does, with `metrics.jsonl` and an
offline W&B run: the digits ConvNet with its own recipe, and a ResNet-18 at 64 × 64 with a line
every 10 updates, the default. A clock runs while anything is done for the record's sake: the
monitor's calls, the counting of flips, what an observed update keeps. The time without telemetry is
the rest; one epoch warms up, those after it are timed. Evaluation and checkpoints are in neither.
The last line is a JSON object; its ratio is the larger of the two.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sclcore.scl.optimizer
from benchmarks.common import options_parser, parse, report, synchronize, table
from benchmarks.training import single_world
from data.packing.pack import pack
from data.sources.digits import digits
from launcher.cluster.world import World
from launcher.recipe.load import load_recipe
from launcher.recipe.recipe import Recipe
from launcher.run.build import build
from launcher.run.engine import process_group
from launcher.run.inputs import open_inputs
from launcher.run.monitor import Monitor
from launcher.run.progress import Progress
from launcher.run.step import train_step
from launcher.tracking import Tracker

_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "digits_scl.yaml"
NETWORKS = {
    "digits ConvNet, batch 64": [],
    "ResNet-18, 64 × 64, batch 64": [
        "model.name=resnet18",
        "data.image_size=64",
        "tracking.log_every=10",
    ],
}
TARGET = 1.01


class Clock:
    """Adds up the seconds spent in the calls that it was given."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running = False
        self.seconds = 0.0

    def around(self, owner: Any, *names: str) -> None:
        """Time these functions of `owner`; one called by another that is timed counts once."""
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return call(*args, **kwargs)
            synchronize(self._device)
            self._running, began = True, time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                synchronize(self._device)
                self.seconds += time.perf_counter() - began
                self._running = False

        return timed


def measure(recipe: Recipe, world: World, device: torch.device, epochs: int) -> dict[str, Any]:
    """Train one epoch to warm up and `epochs` more."""
    inputs = open_inputs(recipe, 1)
    learner, course = build(inputs, world, device)
    tracker = Tracker(recipe.folder, recipe.tracking, run_name=recipe.name, recipe={})
    monitor, progress, clock = Monitor(inputs, learner, tracker), Progress(), Clock(device)
    calls = ("before_step", "after_micro_batch", "after_step", "start_epoch", "end_epoch")
    clock.around(monitor, *calls)
    clock.around(learner.optimizer, "_add_flips")
    observe = sclcore.scl.optimizer.observe
    clock.around(sclcore.scl.optimizer, "observe")
    batches = inputs.batches(0, 0)

    def train_epochs(epochs: range) -> None:
        for epoch in epochs:
            monitor.start_epoch(epoch, done=0)
            learner.engine.train()
            for _ in range(inputs.steps_per_epoch):
                train_step(learner, course, batches, inputs.accumulation, progress, monitor)
            monitor.end_epoch(epoch, progress.step, {"val/top1": 0.0})

    try:
        train_epochs(range(1))
        clock.seconds = 0.0
        synchronize(device)
        began = time.perf_counter()
        train_epochs(range(1, 1 + epochs))
        synchronize(device)
        taken = time.perf_counter() - began
    finally:
        sclcore.scl.optimizer.observe = observe
        tracker.close()
    steps = epochs * inputs.steps_per_epoch
    return {
        "log_every": recipe.tracking.log_every,
        "steps": steps,
        "step_ms": 1e3 * (taken - clock.seconds) / steps,
        "telemetry_ms": 1e3 * clock.seconds / steps,
        "ratio": taken / (taken - clock.seconds),
    }


def main() -> None:
    options = parse(options_parser(__doc__))
    epochs = dict.fromkeys(NETWORKS, 1 if options.quick else 10)
    if not options.quick and options.device == "cpu":
        epochs["ResNet-18, 64 × 64, batch 64"] = 2
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        pack(digits(), Path(folder) / "digits", progress=False)
        world = single_world()
        world.export()
        settings = [f"data.path={folder}/digits", "tracking.wandb=offline", "engine.ranks=1"]
        recipes = {
            name: load_recipe(_RECIPE, [*settings, f"run_dir={folder}/{number}", *changes])
            for number, (name, changes) in enumerate(NETWORKS.items())
            if not (options.quick and changes)
        }
        with process_group(world, next(iter(recipes.values())).engine) as device:
            for name, recipe in recipes.items():
                found[name] = measure(recipe, world, device, epochs[name])
    rows = [
        [
            name,
            f"{each['log_every']}",
            f"{each['step_ms']:.2f} ms",
            f"{each['telemetry_ms']:.3f} ms",
            f"{each['ratio']:.4f}",
        ]
        for name, each in found.items()
    ]
    print(table(["", "line every", "step", "telemetry a step", "ratio"], rows))
    ratio = max(each["ratio"] for each in found.values())
    report("telemetry", ratio=ratio, target=TARGET, device=device, details=found)


if __name__ == "__main__":
    main()
