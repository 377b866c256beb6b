"""Evaluation: each sample of a split exactly once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data.stream.pipeline import DataConfig, ShardDataset, eval_stream, normalise
from launcher.cluster.ranks import average_batch_norm, sum_over_ranks
from launcher.errors import RunError
from launcher.run.inputs import Inputs
from launcher.run.learner import Learner


def validate(learner: Learner, inputs: Inputs, on_batch: Callable[[], None]) -> dict[str, float]:
    """Results on the validation split, with the statistics of all ranks. Collective.

    Of the averaged weights as well, where there are any, as `ema/…`.
    """
    average_batch_norm(learner.model)
    results = _of_the_network(learner, inputs, on_batch)
    if learner.average is not None:
        with learner.average.in_place():
            average_batch_norm(learner.model)
            of_average = _of_the_network(learner, inputs, on_batch)
        results |= {f"ema/{key.removeprefix('val/')}": v for key, v in of_average.items()}
        del results["ema/corrupt"]
    return results


def _of_the_network(
    learner: Learner, inputs: Inputs, on_batch: Callable[[], None]
) -> dict[str, float]:
    learner.engine.eval()
    return evaluate(
        learner.network,
        inputs.val,
        inputs.recipe.data,
        device=learner.device,
        rank=learner.world.rank,
        world_size=learner.world.world_size,
        on_batch=on_batch,
    )


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor],
    dataset: ShardDataset,
    config: DataConfig,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`val/loss`, `val/top1`, `val/top5` (shares of 1) and `val/corrupt` (a count).

    `model` maps normalised images [batch, channels, height, width] to logits [batch, classes]; it
    must be in evaluation mode and be the same on all ranks. A sample that could not be decoded
    counts as wrong. `on_batch` is called before each batch. Collective when `world_size` > 1.

    Raises RunError when the ranks together did not see each sample exactly once.
    """
    totals = torch.zeros(5, dtype=torch.float64, device=device)
    for batch in eval_stream(dataset, config, world_size, rank):
        on_batch()
        valid = batch["valid"].to(device)
        labels = batch["label"].to(device)
        images = normalise(batch["image"].to(device), dataset.manifest.image)
        logits = model(images).float()
        sound = valid & (batch["corrupt"].to(device) == 0)
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        losses = cross_entropy(logits, labels, reduction="none")
        totals += torch.stack(
            [
                (losses * sound).sum().double(),
                (ranked[:, 0] & sound).sum().double(),
                (ranked.any(1) & sound).sum().double(),
                sound.sum().double(),
                valid.sum().double(),
            ]
        )
    if world_size > 1:
        sum_over_ranks(totals)
    loss, top1, top5, sound, seen = totals.tolist()
    if seen != dataset.manifest.samples:
        raise RunError(
            f"evaluation saw {seen:.0f} samples of {dataset.manifest.samples}: the ranks do not "
            "cover the split exactly once"
        )
    return {
        "val/loss": loss / max(1.0, sound),
        "val/top1": top1 / seen,
        "val/top5": top5 / seen,
        "val/corrupt": seen - sound,
    }
