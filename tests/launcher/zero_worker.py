"""One rank that breaks something: DeepSpeed's map of slices, or one rank's masks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.stream.plan import BatchPlan
from launcher.cluster.world import find_world
from launcher.errors import RunError
from launcher.recipe.engine import EngineConfig
from launcher.recipe.load import load_recipe
from launcher.run import loop
from launcher.run.engine import build_engine, process_group
from launcher.run.optimizer_state import OptimizerState, parameter_names
from launcher.train import main
from sclcore import SCL, connection_groups


def network() -> nn.Module:
    """Two layers of the same shape, and biases that are all alike."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    with torch.no_grad():
        for bias in (model[0].bias, model[2].bias):
            bias.zero_()  # type: ignore[operator]
    return model


def check_maps(cases: list[str]) -> None:
    """Write what is said of each spoilt map, as JSON on the last line; null where nothing is."""
    world, config = find_world(), EngineConfig(zero_stage=1)
    world.export()
    said: dict[str, str | None] = {}
    with process_group(world, config):
        for case in cases:
            try:
                stage = 3 if "stage 3" in case else 1
                check_map(case, config.model_copy(update={"zero_stage": stage}))
                said[case] = None
            except RunError as error:
                said[case] = str(error)
    print(json.dumps(said))


def check_map(case: str, config: EngineConfig) -> None:
    """Build an engine, spoil its map of slices as `case` says, and read it."""
    model = network()
    optimizer = SCL(connection_groups(model), lr=0.1, lam=0.1)
    names = parameter_names(model, optimizer)
    plan = BatchPlan(
        shard_sizes=(8,), seed=0, global_batch_size=4, world_size=1, rank=0, accumulation=1
    )
    engine = build_engine(model, optimizer, plan, clip_grad_norm=None, config=config)
    what = case.partition(",")[0]
    (spoil if config.zero_stage == 1 else spoil_stage_3)(what, engine.optimizer, model)
    state = OptimizerState(engine, model, optimizer, names)
    if what == "gate":
        [flat] = optimizer.param_groups[0]["params"]
        optimizer.state[flat]["gate"] = torch.ones(5)
    state.pieces()


def spoil(case: str, zero: Any, model: Any) -> None:
    first, second = (layer.bias._hp_mapping for layer in (model[0], model[2]))
    if case == "swapped":
        # Both are zeros: only their addresses tell them apart.
        one, other = first.hp_fragment_address, second.hp_fragment_address
        first.hp_fragment_address, second.hp_fragment_address = other, one
    elif case == "shifted":
        model[0].weight._hp_mapping.lp_fragment_address.start += 1
        model[0].weight._hp_mapping.lp_fragment_address.numel -= 1
    elif case == "gap":
        model[0].bias._hp_mapping = None
    elif case == "short":
        model[2].bias._hp_mapping = None
    elif case == "round_robin":
        zero.round_robin_gradients = True
    elif case == "offload":
        zero.cpu_offload = True


def spoil_stage_3(case: str, zero: Any, model: Any) -> None:
    weight, first, second = model[0].weight, model[0].bias, model[2].bias
    position = zero.grad_position[zero.get_param_id(first)]
    if case == "swapped":
        # Both are zeros: only their addresses tell them apart.
        first.ds_tensor.data, second.ds_tensor.data = second.ds_tensor.data, first.ds_tensor.data
    elif case == "shifted":
        rolled = weight.ds_tensor.data.roll(1)
        weight.ds_tensor.data.copy_(rolled)
    elif case == "gap":
        position[1] += 1
    elif case == "short":
        zero.fp16_groups[1].pop()
    elif case == "cut":
        zero.sub_group_to_group_id[0] = 1


def train_with_one_odd_rank(recipe: str, run_dir: str) -> int:
    """A real run in which rank 1 loses a weight after 7 updates; compared every 10."""
    ordinary = loop.train_step

    def train_step(learner: Any, course: Any, batches: Any, accumulation: int, *rest: Any) -> None:
        ordinary(learner, course, batches, accumulation, *rest)
        progress, _ = rest
        if progress.step == 7 and learner.world.rank == 1:
            with torch.no_grad():
                mask = next(iter(learner.optimizer.mask_variables().values()))
                mask.view(-1)[0] = -1e6
                learner.optimizer.write_weights()

    loop.train_step = train_step
    folder = load_recipe(Path(recipe)).folder
    assert folder != Path(run_dir)
    settings = ("engine.compare_masks_every=10", f"run_dir={run_dir}")
    arguments = ["--recipe", recipe]
    for setting in settings:
        arguments += ["--set", setting]
    return main(arguments)


if __name__ == "__main__":
    what, *rest = sys.argv[1].split(":")
    if what == "differ":
        sys.exit(train_with_one_odd_rank(*rest))
    check_maps(rest)
