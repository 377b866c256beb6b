"""Two real updates of each recipe: the session, the engine and the loop of `scl train`, one rank.

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
from launcher.engine import EngineConfig, process_group
from launcher.loop import train_step
from launcher.monitor import Monitor
from launcher.preflight import open_inputs
from launcher.recipe import Recipe, load_recipe
from launcher.session import Session, build_session
from launcher.state import Progress
from sclcore import SCL


class Losses(Monitor):
    """A rank's monitor, which also keeps each loss and each norm."""

    def __init__(self, session: Session) -> None:
        super().__init__(session, None)
        self.losses: list[float] = []
        self.norms: list[float] = []

    def after_micro_batch(self, loss: Any, logits: Any, batch: Any) -> None:
        super().after_micro_batch(loss, logits, batch)
        self.losses.append(float(loss.detach()))

    def after_step(self, step: int, *, grad_norm: float, data_wait: float) -> None:
        super().after_step(step, grad_norm=grad_norm, data_wait=data_wait)
        self.norms.append(grad_norm)


def two_updates(recipe: Recipe, world: World, device: torch.device) -> dict[str, Any]:
    session = build_session(recipe, open_inputs(recipe, 1), world, device)
    before = [p.detach().clone() for p in session.model.parameters()]
    progress, monitor = Progress(), Losses(session)
    # In the middle, where neither the warm-up nor the end makes a rate of 0.
    progress.step = session.total_steps // 2 - 2
    batches = session.batches(progress.step)
    session.engine.train()
    for _ in range(2):
        train_step(session, batches, progress, monitor)
    after = [*session.model.parameters()]
    found: dict[str, Any] = {
        "losses": monitor.losses,
        "norms": monitor.norms,
        "finite": all(bool(p.isfinite().all()) for p in after),
        "moved": sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True)),
        "tensors": len(before),
        "optimizer": type(session.optimizer).__name__,
        "updates": session.optimizer_state.updates,
    }
    if isinstance(session.optimizer, SCL):
        masks = session.optimizer.mask_variables()
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
