"""What the optimizer around a method promises it: draws, further passes, losses, state."""

from __future__ import annotations

import copy
import math
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from sclcore import connection_groups
from sclcore.driver.method import DrivenMethod
from sclcore.driver.net import Connected, Net
from sclcore.driver.optimizer import Driver
from sclcore.methods.magnitude import Magnitude
from tests.sclcore.nets import Mixed


class Rows(DrivenMethod, frozen=True):
    """Draws which rows take part in an update, asks for the loss of the others, keeps their means.

    Evaluated is the whole network. State of three kinds: a number for each row, a word, a weight.
    """

    name: Literal["rows"] = "rows"
    started_by: ClassVar = "weight"

    def passes(self, net: Net) -> int:
        return 2

    def start(self, net: Net, fresh: list[Connected]) -> None:
        for each in fresh:
            each.state["weight"] = each.param.detach().clone()
            each.state["seen"] = torch.zeros(len(each.param))
            each.state["word"] = "new"

    def before_update(self, net: Net) -> None:
        generator = net.random()
        for each in net.tensors:
            each.state["drawn"] = torch.rand(len(each.param), generator=generator) < 0.5
        self.before_pass(net, 0)

    def before_pass(self, net: Net, number: int) -> None:
        for each in net.tensors:
            drawn = each.state["drawn"] if number == 0 else ~each.state["drawn"]
            each.param.copy_(each.state["weight"] * drawn[:, None])

    def step(self, net: Net) -> bool:
        first, second = net.losses
        for each in net.tensors:
            each.state["seen"] += each.state["drawn"] * (first - second)
            each.state["word"] = f"update {net.updates}"
            each.param.copy_(each.state["weight"])
        net.move([torch.ones_like(each.param, dtype=torch.bool) for each in net.tensors])
        for each in net.tensors:
            each.state["weight"].copy_(each.param)
        return True

    def masks(self, net: Net) -> list[Tensor]:
        return [each.param != 0 for each in net.tensors]

    def write(self, net: Net) -> None:
        for each in net.tensors:
            each.param.copy_(each.state["weight"])

    def take(self, net: Net, each: Connected) -> int:
        each.state["weight"].copy_(each.param)
        return 0


def layer(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 6, bias=False).double()


def driven(model: nn.Linear, seed: int = 3) -> Driver:
    return Driver(Rows(), connection_groups(model), lr=0.1, momentum=0.0, seed=seed)


IMAGES = torch.arange(32, dtype=torch.float64).view(8, 4) / 32


def loss_of(model: nn.Linear, images: Tensor = IMAGES) -> Tensor:
    return model(images).square().mean()


def update(model: nn.Linear, optimizer: Driver, micro_batches: int = 1) -> list[Tensor]:
    """One update as a loop makes it; the parameters as each forward pass saw them."""
    seen, share = [], 1 / micro_batches
    optimizer.zero_grad()
    optimizer.before_update()
    for images in IMAGES.chunk(micro_batches):
        seen.append(model.weight.detach().clone())
        loss = loss_of(model, images)
        (loss * share).backward()
        optimizer.add_loss(0, loss, share)
        optimizer.before_pass(1)
        seen.append(model.weight.detach().clone())
        with torch.no_grad():
            optimizer.add_loss(1, loss_of(model, images), share)
        optimizer.before_pass(0)
    optimizer.step()
    return seen


def test_passes_see_what_was_drawn_and_the_network_is_whole_again_between_updates() -> None:
    model = layer()
    optimizer = driven(model)
    shares = []
    for _ in range(4):
        before = model.weight.detach().clone()
        first, second = update(model, optimizer)
        closed = (first == 0).all(1)
        shares.append(float(closed.float().mean()))
        assert torch.equal(first + second, before), "each row is in one of the two passes"
        moved = (model.weight != before).any(1)
        assert torch.equal(moved, ~closed), "a row that took no part has no gradient"
    assert 0 < sum(shares) < 4 and len(set(shares)) > 1


def test_accumulated_over_micro_batches_an_update_is_the_same() -> None:
    """To rounding in double: means of means of as many samples."""
    models = [layer(), layer()]
    optimizers = [driven(model) for model in models]
    for _ in range(4):
        update(models[0], optimizers[0])
        assert len(update(models[1], optimizers[1], micro_batches=4)) == 8
    assert torch.allclose(models[0].weight, models[1].weight, rtol=0, atol=1e-14)
    seen = [next(iter(o.state.values()))["seen"] for o in optimizers]
    assert seen[0].abs().max() > 0
    assert torch.allclose(*seen, rtol=0, atol=1e-7), "kept in float32"


def test_what_is_drawn_follows_from_seed_and_update() -> None:
    drawn = []
    for seed in (3, 3, 4):
        model = layer()
        optimizer = driven(model, seed)
        torch.manual_seed(len(drawn))
        drawn.append(torch.stack([update(model, optimizer)[0] != 0 for _ in range(5)]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert any(not torch.equal(drawn[0][0], later) for later in drawn[0][1:])


def test_state_of_any_shape_is_saved_and_loaded() -> None:
    whole, first, second = layer(), layer(), layer(seed=1)
    optimizer, interrupted, resumed = driven(whole), driven(first), driven(second)
    for _ in range(5):
        update(whole, optimizer)
    for _ in range(2):
        update(first, interrupted)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(interrupted.state_dict()))
    for _ in range(3):
        update(second, resumed)
    assert torch.equal(whole.weight, second.weight)
    ours, theirs = (next(iter(o.state.values())) for o in (optimizer, resumed))
    assert (
        torch.equal(ours["seen"], theirs["seen"]) and ours["word"] == theirs["word"] == "update 4"
    )


def test_an_update_that_came_to_nothing_leaves_the_network_as_it_is_evaluated() -> None:
    model = layer()
    optimizer = driven(model)
    update(model, optimizer)
    before = model.weight.detach().clone()
    for kind in ("no gradient", "not finite"):
        optimizer.zero_grad()
        optimizer.before_update()
        assert not torch.equal(model.weight, before)
        if kind == "not finite":
            (loss_of(model) * math.inf).backward()
        optimizer.step()
        assert torch.equal(model.weight, before), kind
    assert optimizer.skipped_steps == 1


def test_losses_that_nobody_told_are_asked_for() -> None:
    model = layer()
    optimizer = driven(model)
    loss_of(model).backward()
    next(iter(optimizer.tensors)).state["drawn"] = torch.ones(6, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"rows needs to know of losses: call before_update"):
        optimizer.step()


def test_a_closure_is_evaluated_with_gradients() -> None:
    plain, closed = layer(), layer()
    update(plain, driven(plain))
    optimizer = driven(closed)
    optimizer.before_update()

    def closure() -> Tensor:
        loss = loss_of(closed)
        loss.backward()
        optimizer.add_loss(0, loss)
        optimizer.before_pass(1)
        optimizer.add_loss(1, loss_of(closed).detach())
        optimizer.before_pass(0)
        return loss

    assert optimizer.step(closure).item() > 0
    assert torch.equal(closed.weight, plain.weight)


@pytest.mark.parametrize(
    ("lr", "weight_decay", "sentence"),
    [
        (-1.0, 0.0, "lr must be 0 or more and finite, not -1.0"),
        (math.inf, 0.0, "lr must be 0 or more and finite, not inf"),
        (0.1, math.nan, "weight_decay must be 0 or more and finite, not nan"),
    ],
)
def test_a_rate_that_is_none_is_refused(lr: float, weight_decay: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Driver(Rows(), connection_groups(layer()), lr=lr, weight_decay=weight_decay)


def test_a_copy_has_the_method_too() -> None:
    model = layer()
    optimizer = driven(model)
    update(model, optimizer)
    other = copy.deepcopy(optimizer)
    assert other.method == optimizer.method and other.seed == optimizer.seed
    assert other.mask_hash() == optimizer.mask_hash()


def test_a_method_sees_every_parameter_by_its_name() -> None:
    model = Mixed()
    driver = Driver(Magnitude(density=0.5), connection_groups(model), lr=0.1)
    with torch.no_grad():
        tensors, others = driver.tensors, driver.others
    assert {each.name: each.param for each in (*tensors, *others)} == dict(model.named_parameters())
    assert {each.name for each in tensors if each.transposed} == {"up.weight"}
    assert driver.connection_names == {each.name for each in tensors}
    [first, *_] = others
    first.state["kept"] = 3
    assert driver.others[0].state["kept"] == 3
