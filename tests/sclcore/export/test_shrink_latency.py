"""Latency by a table of layers, with a clock that counts operations: what is promised is known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sclcore.export.cutting import apply_cut
from sclcore.export.shrink.latency import LatencyModel, fit_into
from sclcore.export.shrink.units import Units


def operations(calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
    """A machine that takes a nanosecond for each multiplication and addition of a layer."""
    found = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            call()
        found[name] = counter.get_total_flops() / 1e6
    return found


def taken(model: nn.Module, units: Units, gone: Tensor, images: Tensor) -> float:
    """What the network without the units `gone` takes on that machine."""
    smaller = copy.deepcopy(model)
    apply_cut(smaller, units.cut(gone))
    return operations({0: lambda: smaller(images)})[0]


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        pytest.param("mobilenetv2_035", marks=pytest.mark.long),
        pytest.param("test_vit", marks=pytest.mark.long),
    ],
)
def test_the_promise_is_the_sum_of_the_layers(name: str) -> None:
    """Operations are bilinear in a layer's features: interpolating between them is exact."""
    torch.manual_seed(0)
    size = 160 if name == "test_vit" else 32
    model = timm.create_model(name, num_classes=5).eval()
    units = Units(model, torch.zeros(1, 3, size, size))
    images = torch.randn(2, 3, size, size)
    latency = LatencyModel(model, units, images, operations)
    assert latency.measured[0] > latency.measured[1] > latency.measured[-1]
    generator = torch.Generator().manual_seed(0)
    for share in (0.2, 0.7):
        gone = torch.rand(units.count, generator=generator) < share
        gone &= ~units.best_of_each_dimension(torch.ones(units.count))
        measured = taken(model, units, gone, images)
        # The attention of a transformer is no layer; its share here is some per cent.
        tolerance = 0.05 if name == "test_vit" else 1e-3
        assert latency.milliseconds(~gone) == pytest.approx(measured, rel=tolerance)
        assert latency.refine(~gone) == pytest.approx(measured, rel=tolerance)


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Units, LatencyModel, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5).eval()
    units = Units(model, torch.zeros(1, 3, 32, 32))
    images = torch.randn(1, 3, 32, 32)
    return model, units, LatencyModel(model, units, images, operations), images


@pytest.mark.parametrize("share", [0.8, 0.4, 0.1])
def test_the_least_valuable_go_until_the_budget_holds(
    network: tuple[nn.Module, Units, LatencyModel, Tensor], share: float
) -> None:
    model, units, latency, images = network
    scores = torch.rand(units.count, generator=torch.Generator().manual_seed(1)) + 0.1
    budget = share * latency.measured[0]
    promise = fit_into(latency, scores, budget)
    measured = taken(model, units, promise.gone, images)
    assert promise.milliseconds == pytest.approx(measured, rel=1e-3)
    assert promise.measured == pytest.approx(measured)
    # A few channels of the first stage are 2 % of this network.
    assert 0.95 * budget < measured <= budget * (1 + 1e-3)
    assert scores[promise.gone].mean() < scores[~promise.gone].mean()


def test_of_equal_units_the_most_expensive_go_first(
    network: tuple[nn.Module, Units, LatencyModel, Tensor],
) -> None:
    _, units, latency, _ = network
    savings = latency.savings(torch.ones(units.count, dtype=torch.bool))
    promise = fit_into(latency, torch.ones(units.count), 0.6 * latency.measured[0])
    assert savings[promise.gone].min() >= 0.99 * savings[~promise.gone].median()


def test_below_what_any_network_reaches_all_goes_but_one_of_each(
    network: tuple[nn.Module, Units, LatencyModel, Tensor],
) -> None:
    model, units, latency, images = network
    promise = fit_into(latency, torch.ones(units.count), 0.5 * latency.measured[-1])
    assert promise.measured == pytest.approx(latency.measured[-1])
    assert taken(model, units, promise.gone, images) == pytest.approx(latency.measured[-1])


def test_a_machine_on_which_layers_take_longer_together_is_learned() -> None:
    """What the table cannot know (a third more for odd networks) is found by timing the choice."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5).eval()
    units = Units(model, torch.zeros(1, 3, 32, 32))
    images = torch.randn(1, 3, 32, 32)
    uneven = False

    def timer(calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
        found = operations(calls)
        whole = list(calls) == [0] and uneven
        return {name: ms * (4 / 3 if whole else 1) for name, ms in found.items()}

    latency = LatencyModel(model, units, images, timer)
    uneven = True
    scores = torch.rand(units.count, generator=torch.Generator().manual_seed(1)) + 0.1
    budget = 0.5 * latency.measured[0]
    promise = fit_into(latency, scores, budget)
    assert promise.measured == pytest.approx(4 / 3 * taken(model, units, promise.gone, images))
    assert 0.94 * budget < promise.measured < 1.02 * budget
    assert promise.milliseconds == pytest.approx(promise.measured, rel=0.02)
