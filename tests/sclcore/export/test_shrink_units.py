"""Units, what they contribute, and whom samples vote for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from sclcore.export import ExportError
from sclcore.export.cutting import apply_cut
from sclcore.export.shrink.contributions import (
    contributions,
    cross_entropies,
    margins,
    sensitivity,
)
from sclcore.export.shrink.units import Units
from sclcore.export.shrink.votes import ballots, tally, votes


class Residual(nn.Module):
    """A sum over two branches, a depthwise convolution, and a pooled classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.branch = nn.Conv2d(6, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.hidden = nn.Linear(6 * 4, 7)
        self.classifier = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.tanh(x + self.branch(torch.tanh(x)))
        x = nn.functional.adaptive_avg_pool2d(self.depthwise(x), 2).flatten(1)
        return self.classifier(torch.tanh(self.hidden(x)))


@pytest.fixture
def residual() -> Residual:
    torch.manual_seed(0)
    return Residual().double().eval()


def test_what_is_tied_is_one_unit_and_outputs_are_none(residual: Residual) -> None:
    units = Units(residual, torch.zeros(1, 2, 8, 8))
    # Six channels that the sum and the depthwise convolution tie together, seven hidden neurons.
    assert units.count == 6 + 7
    assert {r.module: len(r.units) for r in units.readers} == {
        "branch": 6,
        "hidden": 24,
        "classifier": 7,
    }
    assert [layer.groups for layer in units.layers()] == [1, 1, 6, 1, 1]
    gone = torch.zeros(13, dtype=torch.bool)
    gone[[0, 3, 8]] = True
    smaller = copy.deepcopy(residual)
    apply_cut(smaller, units.cut(gone))
    assert smaller.depthwise.weight.shape == (4, 1, 3, 3) and smaller.depthwise.groups == 4
    assert smaller.hidden.weight.shape == (6, 16)
    assert smaller(torch.zeros(2, 2, 8, 8).double()).shape == (2, 3)


def test_one_feature_of_each_tensor_is_kept(residual: Residual) -> None:
    units = Units(residual, torch.zeros(1, 2, 8, 8))
    scores = torch.arange(13).float()
    assert units.best_of_each_dimension(scores).nonzero().flatten().tolist() == [5, 12]


def test_units_that_gates_have_closed(residual: Residual) -> None:
    """Channels of a sum go where both branches are closed; a layer keeps one all the same."""
    units = Units(residual, torch.zeros(1, 2, 8, 8))
    live = {
        "stem.weight": torch.tensor([1, 0, 0, 0, 1, 1]).bool(),
        "branch.weight": torch.tensor([0, 0, 1, 0, 1, 1]).bool(),
        "hidden.weight": torch.zeros(7).bool(),
    }
    gone = units.closed(live)
    assert gone.nonzero().flatten().tolist() == [1, 3, *range(7, 13)]
    assert not units.closed({"classifier.weight": torch.zeros(3).bool()}).any()
    smaller = copy.deepcopy(residual)
    apply_cut(smaller, units.cut(gone))
    assert (smaller.stem.out_channels, smaller.hidden.out_features) == (4, 1)


def test_a_network_without_a_feature_that_could_go_is_refused() -> None:
    with pytest.raises(ExportError, match="Linear has no feature that could go"):
        Units(nn.Linear(3, 2), torch.zeros(1, 3))


@pytest.mark.parametrize("objective", [cross_entropies, margins])
def test_contributions_are_the_derivatives_by_a_gate(residual: Residual, objective: Any) -> None:
    """Against central differences: units scaled by 1 ± 1e-5 where they are read, in float64."""
    units = Units(residual, torch.zeros(1, 2, 8, 8))
    images, labels = torch.randn(5, 2, 8, 8).double(), torch.tensor([0, 1, 2, 0, 1])
    found = contributions(residual, units, [(images[:3], labels[:3]), (images[3:], labels[3:])])
    if objective is margins:
        found = contributions(residual, units, [(images, labels)], margins)
    step = 1e-5
    for unit in range(units.count):
        sides = []
        for gate in (1 + step, 1 - step):
            gated = copy.deepcopy(residual)
            with torch.no_grad():
                for reader in units.readers:
                    gated.get_parameter(reader.weight)[:, reader.units == unit] *= gate
                sides.append(objective(gated(images), labels))
        expected = (sides[0] - sides[1]) / (2 * step)
        # The differences err by step², sums are kept in float32.
        torch.testing.assert_close(found[:, unit].double(), expected, rtol=1e-4, atol=1e-6)


def test_sensitivity_finds_a_unit_that_nobody_needs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        model[2].weight[:, 2] = 0  # type: ignore[index]
    units = Units(model, torch.zeros(1, 4))
    scores = sensitivity(contributions(model, units, [(torch.randn(64, 4), torch.arange(64) % 3)]))
    assert int(scores.argmin()) == 2 and float(scores[2]) == 0 < float(scores.sort().values[1])


def test_a_sample_votes_for_the_fewest_that_make_a_part() -> None:
    layer_of = torch.tensor([0, 0, 0, 0, 1, 1])
    contributed = torch.tensor(
        [
            # 5 of 10 are half already; −3 counts by its size.
            [5.0, 1.0, -3.0, 1.0, 1.0, 0.0],
            # 4 of 9 is not half; the next is taken too.
            [4.0, 2.0, -3.0, 0.0, 0.0, -2.0],
            # Abstains in both layers.
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    voted = ballots(contributed, layer_of, part=0.5)
    assert voted.int().tolist() == [[1, 0, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]


def test_classes_have_the_same_say() -> None:
    """Three samples of one class for the first unit, one of another for the second: a draw."""
    voted = torch.tensor([[True, False]] * 3 + [[False, True]])
    assert tally(voted, torch.tensor([4, 4, 4, 7])).tolist() == [0.5, 0.5]


def test_votes_order_the_units_of_a_trained_network() -> None:
    """A task that two of eight hidden units do: those two have the most votes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(0.01)  # type: ignore[operator]
        model[0].weight[3] = torch.tensor([2.0, 0.0])  # type: ignore[index]
        model[0].weight[6] = torch.tensor([0.0, 2.0])  # type: ignore[index]
        model[2].weight[:, [3, 6]] = torch.tensor([[2.0, 2.0], [-2.0, -2.0]])  # type: ignore[index]
    images = torch.randn(200, 2)
    labels = (images.sum(1) < 0).long()
    units = Units(model, torch.zeros(1, 2))
    shares = votes(contributions(model, units, [(images, labels)], margins), labels, units)
    assert set(shares.argsort()[-2:].tolist()) == {3, 6}
    assert shares.sort().values[-3] < 0.1 < shares.sort().values[-2]


def test_units_of_timms_networks() -> None:
    """Whatever goes, the network that is left computes; attention heads go whole."""
    networks: dict[str, dict[str, Any]] = {
        "resnet10t": {},
        "mobilenetv2_035": {},
        "test_vit": {"img_size": 32, "patch_size": 8},
    }
    for name, kwargs in networks.items():
        model = timm.create_model(name, num_classes=4, **kwargs).eval()
        units = Units(model, torch.zeros(1, 3, 32, 32))
        gone = torch.arange(units.count) % 3 == 0
        gone &= ~units.best_of_each_dimension(torch.ones(units.count))
        smaller = copy.deepcopy(model)
        apply_cut(smaller, units.cut(gone))
        assert smaller(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
        assert contributions(
            model, units, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))]
        ).any()
