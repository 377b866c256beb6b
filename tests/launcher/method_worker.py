"""A rank that trains with each method, one after the other, in one process.

    python -m tests.launcher.method_worker RECIPE OUT [resume]

`resume`: each run is made a second time, from the checkpoint of update `CUT` of the first.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from launcher.cluster.world import World, find_world
from launcher.folder.provenance import write_provenance
from launcher.recipe.load import load_recipe
from launcher.recipe.recipe import Recipe
from launcher.run.build import build
from launcher.run.engine import process_group
from launcher.run.initial import Initial
from launcher.run.inputs import Inputs, find_start, open_inputs
from launcher.run.loop import train

CUT = 17
METHODS = {
    "from_scratch": ("method.density=0.5", "method.gate_lr=0.1", "method.search_until=0.5"),
    "imp": ("method.iterations=2", "method.rewind=weights", "method.rewind_to=0.2"),
    "l0": ("method.lam=3", "method.gate_lr=0.02", "method.keep=0.7"),
    "magnitude": ("method.density=0.2", "method.end=0.7", "method.every=3"),
    "npn": ("method.lam=5", "method.gate_lr=0.03", "method.grow=true", "method.init_size=0.8"),
    "projection": ("method.radius=0.3", "method.end=0.7", "method.every=epoch"),
    "rigl": ("method.density=0.2", "method.end=0.9", "method.every=4"),
    "str": ("method.s_init=-5", "method.s_weight_decay=0.05"),
}


def settings(method: str, out: Path, name: str) -> list[str]:
    run_dir = f"run_dir={out / name}"
    return [f"method.name={method}", *METHODS[method], run_dir, f"checkpoint.every_steps={CUT}"]


def run(recipe: Recipe, opened: Inputs, world: World, device: torch.device) -> None:
    inputs = dataclasses.replace(opened, recipe=recipe)
    start = find_start(recipe, inputs.manifest)
    if world.is_main:
        recipe.folder.mkdir()
        write_provenance(recipe.folder, recipe, world)
    fresh = Initial() if start is None else None
    learner, course = build(inputs, world, device, fresh)
    assert train(inputs, learner, course, start) == 0


def main(recipe_file: Path, out: Path, resume: bool) -> None:
    world = find_world()
    world.export()
    first = load_recipe(recipe_file)
    inputs = open_inputs(first, world.world_size)
    with process_group(world, first.engine) as device:
        for method in METHODS:
            own = settings(method, out, method)
            run(load_recipe(recipe_file, [*own, "checkpoint.keep=99"]), inputs, world, device)
            if resume:
                place = out / method / "checkpoints" / f"step-{CUT:08d}"
                again = settings(method, out, f"{method}-resumed")
                again.append(f"checkpoint.resume={place}")
                run(load_recipe(recipe_file, again), inputs, world, device)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "resume" in sys.argv)
