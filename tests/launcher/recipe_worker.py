"""Two real updates of each recipe: the network, the engine and the loop of `scl train`, one rank.

    python -m tests.launcher.recipe_worker RECIPE.yaml=JSON-LIST-OF-SETTINGS …

Prints a JSON object: recipe → what its two updates did.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from launcher.cluster.world import World, find_world
from launcher.recipe.engine import EngineConfig
from launcher.recipe.load import load_recipe
from launcher.recipe.recipe import Recipe
from launcher.run.build import build
from launcher.run.engine import process_group
from launcher.run.inputs import Inputs, open_inputs
from launcher.run.learner import Learner
from launcher.run.monitor import Monitor
from launcher.run.progress import Progress
from launcher.run.step import train_step
from sclcore import SCL


class Losses(Monitor):
    """A rank's monitor, which also keeps each loss and each norm."""

    def __init__(self, inputs: Inputs, learner: Learner) -> None:
        super().__init__(inputs, learner, None)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def after_micro_batch(self, loss: Any, logits: Any, batch: Any) -> None:
        super().after_micro_batch(loss, logits, batch)
        self.losses.append(float(loss.detach()))

    def after_step(self, step: int, *, grad_norm: float, data_wait: float) -> None:
        super().after_step(step, grad_norm=grad_norm, data_wait=data_wait)
        self.norms.append(grad_norm)


def two_updates(recipe: Recipe, world: World, device: torch.device) -> dict[str, Any]:
    inputs = open_inputs(recipe, 1)
    learner, course = build(inputs, world, device)
    before = [p.detach().clone() for p in learner.model.parameters()]
    progress, monitor = Progress(), Losses(inputs, learner)
    # In the middle, where neither the warm-up nor the end makes a rate of 0.
    progress.step = inputs.total_steps // 2 - 2
    batches = inputs.batches(0, progress.step)
    learner.engine.train()
    for _ in range(2):
        train_step(learner, course, batches, inputs.accumulation, progress, monitor)
    after = [*learner.model.parameters()]
    found: dict[str, Any] = {
        "losses": monitor.losses,
        "norms": monitor.norms,
        "finite": all(bool(p.isfinite().all()) for p in after),
        "moved": sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True)),
        "tensors": len(before),
        "optimizer": type(learner.optimizer).__name__,
        "updates": learner.optimizer_state.updates,
    }
    if isinstance(learner.optimizer, SCL):
        masks = learner.optimizer.mask_variables()
        found["masks_moved"] = sum(not bool((m == 1.0).all()) for m in masks.values())
        found["masks"] = len(masks)
    return found


def main() -> None:
    results: dict[str, Any] = {}
    world = find_world()
    world.export()
    with process_group(world, EngineConfig(threads=2)) as device:
        for argument in sys.argv[1:]:
            path, _, settings = argument.partition("=")
            began = time.process_time()
            recipe = load_recipe(Path(path), json.loads(settings))
            results[path] = two_updates(recipe, world, device)
            gc.collect()
            print(f"{recipe.name}: {time.process_time() - began:.1f} s of CPU time", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
