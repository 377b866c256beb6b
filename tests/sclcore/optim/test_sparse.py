"""What all optimizers with masks share: masks applied to another model of the same network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

from sclcore import SCL, apply_masks, connection_groups
from tests.sclcore.nets import Mlp, mlp, mlp_batches, train


@pytest.fixture(scope="module")
def trained() -> tuple[Mlp, SCL, AveragedModel]:
    """A model of which half is dead, and its average over the way there."""
    model = mlp()
    optimizer = SCL(connection_groups(model), lr=0.05, lam=0.4, mask_lr=0.02)
    averaged = AveragedModel(model)
    train(model, optimizer, mlp_batches(60), after=lambda _: averaged.update_parameters(model))
    return model, optimizer, averaged


def _masks() -> dict[str, Tensor]:
    masks = {"0.weight": torch.ones(16, 8, dtype=torch.bool)}
    masks["0.weight"][3, 5] = False
    return masks


def test_an_average_becomes_as_sparse_as_the_model(trained: tuple[Mlp, SCL, AveragedModel]) -> None:
    model, optimizer, averaged = trained
    before = [p.detach().clone() for p in averaged.parameters()]
    assert before[0].all(), "else there is nothing to do"
    optimizer.apply_masks(averaged)
    masks = optimizer.masks()
    assert 0 < int(masks["0.weight"].sum()) < 100
    for (name, p), was in zip(averaged.named_parameters(), before, strict=True):
        bare = name.removeprefix("module.")
        expected = torch.where(masks[bare], was, 0.0) if bare in masks else was
        assert torch.equal(p, expected), name
    for p, q in zip(averaged.parameters(), model.parameters(), strict=True):
        assert torch.equal(p == 0, q == 0) or p.ndim == 1


@pytest.mark.parametrize("outer", [AveragedModel, torch.compile, lambda m: m])
@pytest.mark.parametrize("inner", [AveragedModel, lambda m: m])
def test_wrappers_of_either_model_do_not_matter(outer, inner) -> None:
    wrapped = outer(inner(mlp()))
    named = {f"module._orig_mod.{name}": mask for name, mask in _masks().items()}
    for masks in (_masks(), named):
        model = outer(inner(mlp()))
        apply_masks(model, masks)
        [changed] = [
            p
            for p, q in zip(model.parameters(), wrapped.parameters(), strict=True)
            if not torch.equal(p, q)
        ]
        assert (changed == 0).nonzero().tolist() == [[3, 5]]


def test_infinite_values_of_dead_connections_are_0_too() -> None:
    model = mlp()
    with torch.no_grad():
        model.first.weight[3, 5] = torch.inf
    apply_masks(model, _masks())
    assert model.first.weight.isfinite().all()


@pytest.mark.parametrize("model", [nn.Linear(8, 16), nn.Sequential(nn.Linear(8, 15))])
def test_masks_of_another_model_are_refused_and_nothing_changes(model: nn.Module) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"0.weight of shape \(16, 8\) is masked") as error:
        apply_masks(model, {"0.weight": torch.zeros(16, 8, dtype=torch.bool)})
    assert "\n" not in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.usefixtures("alone")
def test_sharded_parameters() -> None:
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    apply_masks(model, _masks())
    whole = model.first.weight.full_tensor()  # type: ignore[operator]
    assert (whole == 0).nonzero().tolist() == [[3, 5]]
