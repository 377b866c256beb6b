"""The state of a run: what a checkpoint holds of it, and how it is given back to the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from launcher.checkpoints import checkpoint
from launcher.checkpoints.checkpoint import Checkpoint
from launcher.checkpoints.saved_optimizer import SavedOptimizer, optimizer_part
from launcher.cluster.ranks import (
    from_main,
    gather_to_main,
    local_state,
    mean_batch_norm,
    restore_local_state,
)
from launcher.cluster.world import World
from launcher.errors import RunError
from launcher.run.learner import Learner
from launcher.run.progress import Progress
from sclcore.optim.sparse import SparseOptimizer, hash_masks


def parts_of(learner: Learner) -> dict[str, Any]:
    """What this rank saves, by part: the memory that is trained on, not copies. Collective.

    Rank 0 saves the model, with the mean of all ranks' batch statistics: the network as it would be
    evaluated, and what ranks start from for which no state of their own was saved.
    """
    rank = learner.world.rank
    means = mean_batch_norm(learner.model)
    parts: dict[str, Any] = {rank_part(rank): local_state(learner.model, learner.device)}
    if pieces := learner.optimizer_state.pieces():
        parts[optimizer_part(rank)] = pieces
    if (state := learner.parameters.state()) is not None:
        for name, mean in means.items():
            state[name] = mean.to(state[name].dtype)
        parts["model"] = state
    if learner.average is not None:
        parts[rank_part(rank)]["average"] = learner.average.state()
        with learner.average.in_place():
            means = mean_batch_norm(learner.model)
        if (average := learner.average.parameters()) is not None:
            parts["average"] = average | means
    return parts


def rank_part(rank: int) -> str:
    return f"rank-{rank:05d}"


def restore(start: Checkpoint | None, learner: Learner) -> Progress:
    """Load a checkpoint into model, optimizer and generators; without one, a fresh `Progress`.

    At another world size than it was saved with, all ranks take the mean of the saved batch
    statistics, and generators as rank 0 had them, those of PyTorch seeded by rank.
    """
    if start is None:
        return Progress()
    world = learner.world
    mapped = not learner.parameters.are_whole
    learner.parameters.load(checkpoint.load_part(start, "model", mapped=mapped))
    learner.optimizer_state.load(SavedOptimizer(start))
    same_world = start.meta["environment"]["world_size"] == world.world_size
    local = checkpoint.load_part(start, rank_part(world.rank if same_world else 0))
    if not same_world:
        local["buffers"] = {}
    restore_local_state(learner.model, learner.device, local)
    if learner.average is not None:
        average = checkpoint.load_part(start, "average", mapped=mapped)
        learner.average.restore(average, local["average"], same_world=same_world)
    if not same_world and world.rank:
        torch.manual_seed(start.meta["recipe"]["seed"] + world.rank)
    return Progress(**start.meta["progress"])


def monitor_state(start: Checkpoint | None, world: World) -> dict[str, Any] | None:
    """What the monitor of this rank had counted; None if nothing is known of it.

    At another world size, sums over the samples of a rank mean nothing and are left out.
    """
    if start is None:
        return None
    same_world = start.meta["environment"]["world_size"] == world.world_size
    part = checkpoint.load_part(start, rank_part(world.rank if same_world else 0))
    counted = part.get("monitor")
    if counted is not None and not same_world:
        del counted["sums"]
    return counted


def copied_to_cpu(tree: Any) -> Any:
    """The same tree with every tensor copied into CPU memory of its own."""
    if isinstance(tree, Tensor):
        # Contiguous, or a slice would be saved with all that it is a slice of.
        return tree.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(tree, dict):
        return {key: copied_to_cpu(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(copied_to_cpu(value) for value in tree)
    return tree


def bytes_of(tree: Any) -> int:
    """Bytes of all tensors in a tree."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return 0
    return sum(bytes_of(value) for value in tree)


def check_masks_agree(learner: Learner) -> None:
    """Compare the live connections of the ranks' networks; RunError names both hashes. Collective.

    It is the network that is compared, as each rank computes with it: under ZeRO no rank holds all
    masks, but the weights that were gathered must have the same zeros everywhere. In stage 3 there
    is one network, of which each rank has its own stretches: nothing could differ.
    """
    if not isinstance(learner.optimizer, SparseOptimizer) or not learner.parameters.are_whole:
        return
    learned = learner.optimizer.connection_names
    parameters = learner.model.named_parameters()
    ours = hash_masks({name: p.detach() != 0 for name, p in parameters if name in learned})
    hashes = from_main(gather_to_main(ours))
    for rank, other in enumerate(hashes):
        if other != hashes[0]:
            raise RunError(
                f"the masks of rank {rank} differ from those of rank 0 "
                f"({other[:16]}… and {hashes[0][:16]}…): the ranks did not see the same gradients; "
                "nothing was saved of this step"
            )
