"""A rank that trains with each method, one after the other, in one process.

    python -m tests.launcher.method_worker RECIPE OUT [resume]

`resume`: each run is made a second time, from the checkpoint of update `CUT` of the first.
"""

from __future__ import annotations

import dataclasses
import json
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
from sclcore.registry import known_methods

CUT = 9
METHODS = {
    name: tuple(f"method.{key}={json.dumps(value)}" for key, value in kind.example.items())
    for name, kind in known_methods().items()
    if kind.example is not None
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
