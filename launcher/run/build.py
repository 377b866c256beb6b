"""Recipe → what a rank trains: model, optimizer, hyper-parameters, DeepSpeed engine."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.optim import Optimizer

from launcher.cluster.ranks import sum_over_ranks
from launcher.cluster.world import World
from launcher.recipe.recipe import Recipe
from launcher.run.average import WeightAverage
from launcher.run.course import Course
from launcher.run.engine import build_engine
from launcher.run.fast import make_fast, set_arithmetic, set_layout
from launcher.run.initial import (
    FirstState,
    Initial,
    first_masks,
    hash_weights,
    initial_model,
    share,
)
from launcher.run.inputs import Inputs
from launcher.run.learner import Learner
from launcher.run.optimizer import build_optimizer
from launcher.run.optimizer_state import OptimizerState, parameter_names
from launcher.run.parameters import Parameters
from launcher.run.target import controller_of
from launcher.run.teacher import read_teacher
from sclcore import layer_budgets, weight_uses
from sclcore.kernels.find import find_kernel
from sclcore.network.connections import find_connections
from sclcore.optim.sparse import SparseOptimizer


def build(
    inputs: Inputs,
    world: World,
    device: torch.device,
    initial: Initial | None = None,
) -> tuple[Learner, Course]:
    """The same network on every rank, and the course of its training. Collective.

    `initial` is what a new run starts from, whole on rank 0; None for one that continues.
    """
    agree_on_fused_steps(device)
    recipe = inputs.recipe
    set_arithmetic(recipe.engine, device)
    model = initial_model(recipe, inputs.manifest, initial or Initial()).to(device)
    if initial is not None:
        share(model)
    initial_hash = hash_weights(model) if initial is not None and world.is_main else None
    optimizer = build_optimizer(inputs.method, recipe.optim, model, inputs.example)
    # Made with random numbers of its own, so that the student is the same with or without it.
    with torch.random.fork_rng(devices=[]):
        teacher = read_teacher(recipe, inputs.manifest, in_half=recipe.engine.precision != "fp32")
    controller = controller_of(recipe, model, optimizer, inputs.example, inputs.total_steps)
    course = Course(
        recipe,
        optimizer,
        controller,
        inputs.total_steps,
        shift=inputs.shift,
        is_main=world.is_main,
    )
    names = parameter_names(model, optimizer)
    masks = first_masks(optimizer, recipe.init, initial) if initial is not None else {}
    # While parameters are whole, which they need not be in the engine.
    connections = sum(c.parameter.numel() for c in find_connections(model))
    uses = weight_uses(model, inputs.example) if world.is_main else {}
    budgets = layer_budgets(model, uses) if world.is_main else []
    make_fast(model, recipe.engine)
    engine = build_engine(
        model,
        optimizer,
        inputs.plan(world.rank),
        clip_grad_norm=recipe.optim.clip_grad_norm,
        config=recipe.engine,
    )
    set_layout(model, recipe.engine)
    optimizer_state = OptimizerState(engine, model, optimizer, names)
    if masks:
        optimizer_state.load(FirstState(optimizer_state.parameters, masks, optimizer_state.updates))
    learner = Learner(
        world=world,
        device=device,
        model=model,
        optimizer=optimizer,
        optimizer_state=optimizer_state,
        engine=engine,
        loss_function=nn.CrossEntropyLoss(label_smoothing=recipe.optim.label_smoothing),
        image=inputs.manifest.image,
        connections=connections,
        budgets=budgets,
        mixing=recipe.data.mixing,
        teacher=None if teacher is None else teacher.to(device),
        average=average_of(recipe, optimizer_state.parameters, optimizer),
        initial_weights_hash=initial_hash,
    )
    return learner, course


def average_of(
    recipe: Recipe, parameters: Parameters, optimizer: Optimizer
) -> WeightAverage | None:
    """The average of the weights that the recipe asks for."""
    if recipe.optim.ema_decay is None:
        return None
    masked = optimizer.connection_names if isinstance(optimizer, SparseOptimizer) else ()
    return WeightAverage(parameters, recipe.optim.ema_decay, masked)


def agree_on_fused_steps(device: torch.device) -> None:
    """Use fused steps on all ranks or on none, since they round differently. Collective."""
    missing = torch.tensor([float(find_kernel(device) is None)], device=device)
    if sum_over_ranks(missing) > 0:
        os.environ["SCL_FUSED"] = "0"
