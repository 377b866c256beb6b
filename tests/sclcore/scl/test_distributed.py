"""Real ranks: the gradient all-reduce of dense training is all that SCL needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.sclcore import ddp_worker
from tests.sclcore.nets import mlp, mlp_batches
from tests.sclcore.ranks import launch

TIMEOUT = 120  # seconds; a run takes about 10 where nothing else does


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """World size → what each rank came to; a rank that fails or hangs is a failure."""
    folder = tmp_path_factory.mktemp("ranks")
    launch("tests.sclcore.ddp_worker", folder, world=max(ddp_worker.WORLDS), timeout=TIMEOUT)
    return {
        world: [torch.load(folder / f"out.{world}.{r}", weights_only=True) for r in range(world)]
        for world in ddp_worker.WORLDS
    }


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """One process on the global batches."""
    model, optimizer = ddp_worker.make()
    return ddp_worker.run(model, model, optimizer, rank=0, world=1)


@pytest.mark.parametrize("world", ddp_worker.WORLDS)
def test_ranks_equal_one_process_on_the_same_global_batch(
    world: int, single: dict[str, Any], ranks: dict[int, list[dict[str, Any]]]
) -> None:
    assert len(set(single["hashes"])) > ddp_worker.STEPS // 4, "the masks kept changing"
    assert len(ranks[world]) == world
    for rank in ranks[world]:
        assert rank["hashes"] == single["hashes"], "at each of the steps"
    first, *others = ranks[world]
    for part in ("model", "mask_variables"):
        for name, value in single[part].items():
            # Means of means of 12 samples, in float64: about 1e-16 per step, hardly amplified in
            # 60; the order of the sums is all that differs.
            torch.testing.assert_close(first[part][name], value, rtol=0, atol=1e-11)
            for other in others:
                # Among ranks nothing differs at all: each got the same all-reduced bits.
                assert torch.equal(other[part][name], first[part][name]), name


def _per_feature(grad: Tensor) -> Tensor:
    return grad / grad.square().mean(1, keepdim=True).sqrt()


def test_normalising_before_the_average_would_choose_other_masks() -> None:
    """The order matters, so a layer on top of the optimizer could not do it: normalise after.

    Two ranks, the same weights throughout; only the order of averaging and normalising differs.
    """
    model = mlp(dtype=torch.float64)
    weight = model.first.weight
    lam, mask_lr, momentum = 0.3, 0.02, 0.9
    masks = {"after": torch.ones_like(weight), "before": torch.ones_like(weight)}
    velocity = {key: torch.zeros_like(weight) for key in masks}
    cosines = []
    for x, y in mlp_batches(60, dtype=torch.float64):
        grads = []
        for rank in range(2):
            half = slice(rank * 6, (rank + 1) * 6)
            loss = nn.functional.mse_loss(model(x[half]), y[half])
            grads.append(torch.autograd.grad(loss, weight)[0] * weight.detach())
        direction = {
            "after": _per_feature((grads[0] + grads[1]) / 2),
            "before": (_per_feature(grads[0]) + _per_feature(grads[1])) / 2,
        }
        flat = [d.flatten() for d in direction.values()]
        cosines.append(float(torch.cosine_similarity(flat[0], flat[1], dim=0)))
        for key, mask in masks.items():
            velocity[key] = momentum * velocity[key] + direction[key] + lam
            mask -= mask_lr * velocity[key]
    live = {key: mask > 0 for key, mask in masks.items()}
    differing = int((live["after"] != live["before"]).sum())
    # Not rounding: other directions, and several of the 128 masks decided otherwise.
    assert sum(cosines) / len(cosines) < 0.99
    assert differing >= 4
    assert 10 < int(live["after"].sum()) < 118, "a choice was made"
