"""Linearly dependent units go without loss, and only those, unless a share is asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore.export import ExportError
from sclcore.export.shrink.dependence import Dependences
from sclcore.export.shrink.units import Units

# Outputs of size 1 in float64, through least squares of some tens of columns.
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-12}


class Mlp(nn.Module):
    """Its first hidden layer is linear, so that its rank is known: 9 neurons of rank 3."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(6, 9)
        self.b = nn.Linear(9, 7, bias=bias)
        self.c = nn.Linear(7, 3)
        with torch.no_grad():
            self.double().a.weight.copy_(torch.randn(9, 3).double() @ torch.randn(3, 6).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.a(x))))


class Convolutions(nn.Module):
    """Its first convolution has 8 filters of rank 4."""

    def __init__(self, padding: int, size: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, 3, padding=padding)
        self.c = nn.Linear(6 * size * size, 3)
        self.size = size
        with torch.no_grad():
            weight = torch.randn(8, 4).double() @ torch.randn(4, 18).double()
            self.double().a.weight.copy_(weight.view(8, 2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.b(self.a(x)))
        return self.c(nn.functional.adaptive_avg_pool2d(maps, self.size).flatten(1))


@pytest.mark.parametrize(("bias", "left"), [(True, 3), (False, 4)])
def test_neurons_of_a_layer_of_known_rank(bias: bool, left: int) -> None:
    """Rank 3 and constants: the reader's bias takes those up, without one a neuron has to stay."""
    torch.manual_seed(1)
    model = Mlp(bias)
    units = Units(model, torch.zeros(1, 6))
    batches = [torch.randn(100, 6).double() for _ in range(3)]
    dependences = Dependences(model, units, batches)
    found = dependences.find(units.count)
    smaller = dependences.remove(found.gone)
    assert (smaller.a.out_features, smaller.b.in_features) == (left, left)  # type: ignore[union-attr]
    assert smaller.b.out_features == 7, "tanh makes the others independent"  # type: ignore[union-attr]
    # On images that it has not seen.
    images = 3 * torch.randn(500, 6).double()
    torch.testing.assert_close(smaller(images), model(images), **EXACT)
    again = Units(smaller, torch.zeros(1, 6))
    assert not Dependences(smaller, again, batches).find(again.count).gone.any()


def test_too_few_images_to_tell_are_refused() -> None:
    model = Mlp()
    units = Units(model, torch.zeros(1, 6))
    # Nine features and the constant.
    with pytest.raises(
        ExportError, match=r"of the 10 columns that b.weight reads, 19 rows say too"
    ):
        Dependences(model, units, [torch.randn(19, 6)])
    Dependences(model, units, [torch.randn(20, 6)])


def test_a_network_in_float32_is_dependent_within_its_own_rounding() -> None:
    torch.manual_seed(1)
    model = Mlp().float()
    units = Units(model, torch.zeros(1, 6))
    dependences = Dependences(model, units, [torch.randn(300, 6)])
    smaller = dependences.remove(dependences.find(units.count).gone)
    assert smaller.b.in_features == 3  # type: ignore[union-attr]
    images = torch.randn(500, 6)
    # Outputs of size 1, each of some tens of products in float32.
    torch.testing.assert_close(smaller(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("padding", "left"), [(0, 4), (1, 5)])
def test_filters_of_a_layer_of_known_rank(padding: int, left: int) -> None:
    """A constant goes into the bias through every tap; beside padding it may not, and one stays.

    Rank 4 and the filters' biases, which are a fifth dimension of what is read.
    """
    torch.manual_seed(2)
    model = Convolutions(padding, 2)
    units = Units(model, torch.zeros(1, 2, 8, 8))
    dependences = Dependences(model, units, [torch.randn(60, 2, 8, 8).double()])
    smaller = dependences.remove(dependences.find(units.count).gone)
    assert smaller.a.out_channels == left and smaller.b.out_channels == 6  # type: ignore[union-attr]
    images = torch.randn(30, 2, 11, 9).double()
    torch.testing.assert_close(smaller(images), model(images), **EXACT)


def test_channels_that_a_flattened_layer_reads_at_several_places() -> None:
    torch.manual_seed(3)
    model = Convolutions(1, 2)
    bias: Any = model.b.bias
    with torch.no_grad():
        # The last two filters of b are multiples of others, which ReLU leaves them.
        for copied, of in ((4, 0), (5, 2)):
            model.b.weight[copied] = 2 * model.b.weight[of]
            bias[copied] = 2 * bias[of]
    units = Units(model, torch.zeros(1, 2, 8, 8))
    dependences = Dependences(model, units, [torch.randn(60, 2, 8, 8).double()])
    smaller = dependences.remove(dependences.find(units.count).gone)
    assert smaller.b.out_channels == 4 and smaller.c.in_features == 16  # type: ignore[union-attr]
    images = torch.randn(30, 2, 8, 8).double()
    torch.testing.assert_close(smaller(images), model(images), **EXACT)


class Sum(nn.Module):
    """Channels that two layers read, each after another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.one, self.two = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.one(x) + self.two(torch.relu(x))


def test_a_unit_that_two_layers_read_goes_only_where_both_can_do_without() -> None:
    torch.manual_seed(4)
    model = Sum().double()
    with torch.no_grad():
        # Twice another, before and after ReLU; and less than nothing of another, only before it.
        model.stem.weight[1], model.stem.bias[1] = 2 * model.stem.weight[0], 2 * model.stem.bias[0]
        model.stem.weight[3], model.stem.bias[3] = -model.stem.weight[2], -model.stem.bias[2]
        # The others are no combinations for `two`; for `one`, 8 numbers of 5 have to be.
    units = Units(model, torch.zeros(1, 5))
    dependences = Dependences(model, units, [torch.randn(300, 5).double()])
    gone = dependences.find(units.count).gone.nonzero().flatten().tolist()
    assert gone in ([0], [1])
    smaller = dependences.remove(torch.arange(units.count) == gone[0])
    images = torch.randn(100, 5).double()
    torch.testing.assert_close(smaller(images), model(images), **EXACT)


def test_a_share_takes_what_comes_nearest_and_the_mending_helps() -> None:
    """Of 30 neurons that nearly depend on 8: without mending the outputs are far worse."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(10, 30), nn.Linear(30, 4)).double()
    with torch.no_grad():
        weight = torch.randn(30, 8) @ torch.randn(8, 10) + 1e-3 * torch.randn(30, 10)
        model[0].weight.copy_(weight)  # type: ignore[operator]
    units = Units(model, torch.zeros(1, 10))
    images = torch.randn(400, 10).double()
    dependences = Dependences(model, units, [images])
    # Only what 10 numbers of rank 30 and a constant make exact goes without loss: not 22 of 30.
    assert int(dependences.find(99).gone.sum()) == 20
    found = dependences.find(20, math.inf)
    assert int(found.gone.sum()) == 20
    mended = dependences.remove(found.gone)
    with torch.no_grad():
        expected = model(images)
        error = (mended(images) - expected).norm() / expected.norm()
        plain = nn.functional.linear(
            model[0](images)[:, ~found.gone],
            model[1].weight[:, ~found.gone],  # type: ignore[index]
            model[1].bias,  # type: ignore[arg-type]
        )
        unmended = (plain - expected).norm() / expected.norm()
    assert error < 1e-2 < 0.3 < unmended
    # Every tensor keeps a feature, however much is asked for.
    assert int(dependences.find(99, math.inf).gone.sum()) == 29
