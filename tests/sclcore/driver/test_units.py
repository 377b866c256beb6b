"""Which features have gates, and what dies with them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.models.build import create_model
from launcher.recipe.model import ModelConfig
from sclcore.driver.units import Units, find_units
from tests.sclcore.driver.gated_net import GatedNet


def units_of(name: str, size: int = 32, joined: bool = False, **kwargs: Any) -> dict[str, Units]:
    with torch.device("meta"):
        model = create_model(ModelConfig(name=name, kwargs=kwargs), num_classes=10, in_chans=3)
        example = torch.empty(1, 3, size, size)
    return find_units(model, example, [], joined=joined)


def gated(units: dict[str, Units]) -> set[str]:
    return {name.removesuffix(".weight") for name, each in units.items() if each["count"]}


def test_the_network_with_every_kind_of_gate() -> None:
    model = GatedNet()
    before = {name: p.clone() for name, p in model.named_parameters()}
    units = find_units(model, torch.zeros(1, 2, 4, 4), [], joined=False)
    assert units == {
        "conv.weight": _units(4, vectors=["norm.weight", "norm.bias"], on_rows=False),
        "deep.weight": _units(4, vectors=["deep.bias"], columns=[("conv.weight", 1)], groups=2),
        "hidden.weight": _units(5, vectors=["hidden.bias"], columns=[("deep.weight", 4)]),
        "head.weight": _units(0, columns=[("hidden.weight", 1)]),
    }
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def _units(count: int, **more: Any) -> dict[str, Any]:
    plain = {"count": count, "on_rows": True, "vectors": [], "columns": [], "groups": 1}
    return plain | more


def test_residual_networks_have_gates_inside_of_their_blocks() -> None:
    """As the papers have them: the first convolution of a basic block, two of a bottleneck."""
    small = units_of("resnet18")
    assert gated(small) == {f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)}
    assert small["layer2.0.conv1.weight"]["vectors"] == [
        "layer2.0.bn1.weight",
        "layer2.0.bn1.bias",
    ]
    assert small["layer2.0.conv2.weight"]["columns"] == [("layer2.0.conv1.weight", 1)]
    assert small["layer2.1.conv1.weight"]["columns"] == []
    large = units_of("resnet26")
    assert {name.rpartition(".")[2] for name in gated(large)} == {"conv1", "conv2"}
    everything = units_of("resnet18", joined=True)
    assert gated(everything) == {n.removesuffix(".weight") for n in everything} - {"fc"}
    assert everything["layer2.0.conv1.weight"]["columns"] == []


def test_depthwise_convolutions_and_squeeze_and_excitation() -> None:
    units = units_of("mobilenetv2_050", size=32)
    block = "blocks.1.0."
    depthwise = units[f"{block}conv_dw.weight"]
    assert depthwise["groups"] == depthwise["count"] > 1
    assert depthwise["columns"] == [(f"{block}conv_pw.weight", 1)]
    assert units[f"{block}conv_pwl.weight"]["columns"] == [(f"{block}conv_dw.weight", 1)]
    assert not depthwise["on_rows"]
    # What is multiplied by the result of two more layers is 0 where it was.
    excited = units_of("mobilenetv3_small_050", size=32)
    last = excited["blocks.2.0.conv_pwl.weight"]["columns"]
    assert last == [("blocks.2.0.conv_dw.weight", 1)]


def test_vgg_flattens_its_last_maps() -> None:
    units = units_of("vgg11_bn", size=32)
    names = list(units)
    assert gated(units) == {name.removesuffix(".weight") for name in names[:-1]}
    for before, name in itertools.pairwise(names):
        assert units[name]["columns"] == [(before, 1)], name


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.Sigmoid(), nn.Softmax(1)])
def test_what_makes_something_of_nothing_keeps_its_columns(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), norm, nn.Conv2d(4, 2, 1))
    units = find_units(model, torch.zeros(1, 1, 2, 2), [], joined=False)
    assert gated(units) == {"0"}
    assert units["2.weight"]["columns"] == []


class Twice(nn.Module):
    """Uses one layer twice; reads what batch norm normalises besides; changes it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.read_norm = nn.BatchNorm1d(4)
        self.changed = nn.Linear(4, 4)
        self.changed_norm = nn.BatchNorm1d(4)
        self.plain = nn.Linear(4, 4)
        self.plain_norm = nn.BatchNorm1d(4, affine=False)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(x).tanh()).tanh()
        normalised = self.read_norm(read := self.read(x))
        x = (normalised * read.sigmoid()).tanh()
        x = self.changed_norm(nn.functional.relu(self.changed(x), inplace=True))
        return self.head(self.plain_norm(self.plain(x)))


def test_where_a_feature_cannot_be_shut_there_is_no_gate() -> None:
    model = Twice()
    units = find_units(model, torch.zeros(1, 4), [], joined=False)
    assert gated(units) == {"changed"}
    assert units["changed.weight"]["on_rows"]
    assert units["plain.weight"]["columns"] == []


def test_what_is_frozen_or_left_out_has_no_gate() -> None:
    model = GatedNet()
    model.norm.bias.requires_grad_(False)
    units = find_units(model, torch.zeros(1, 2, 4, 4), ["hidden"], joined=False)
    assert gated(units) == {"deep"}
    assert "hidden.weight" not in units
    assert units["head.weight"]["columns"] == []


def test_a_network_without_units_is_refused_in_a_sentence() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"Sequential has no units to gate: no Linear or"):
        find_units(model, torch.zeros(1, 4), [], joined=False)
    with pytest.raises(ValueError, match="or set joined to gate"):
        find_units(_Sum(), torch.zeros(1, 4), [], joined=False)


class _Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(x) + self.two(x))
