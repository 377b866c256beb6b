"""Cuts: networks made smaller from what is kept, whatever their weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn

from sclcore.export import ExportError
from sclcore.export.cut import Cut, Kept
from sclcore.export.cutting import apply_cut, inputs_of_layers, keep_variance
from sclcore.export.removal.features import Features
from sclcore.export.removal.program import trace
from sclcore.export.removal.surgery import cut_of


def features_of(model: nn.Module, *shape: int) -> Features:
    return Features(trace(model, torch.zeros(shape)))


def every_other(features: Features) -> torch.Tensor:
    """Every second group that may go, in whatever order; one of each dimension stays."""
    removed = torch.zeros(features.count(), dtype=torch.bool)
    frozen = features.frozen()
    for axes in features.axes.values():
        for labels in axes.values():
            roots = features.roots(labels).unique()
            removed[[r for r in roots[1::2].tolist() if r not in frozen]] = True
    for axes in features.axes.values():
        for labels in axes.values():
            roots = features.roots(labels)
            if removed[roots].all():
                removed[roots[0]] = False
    return removed


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("resnet10t", {}, 32),
        ("mobilenetv2_035", {}, 32),
        ("test_vit", {"img_size": 16, "patch_size": 4}, 16),
        ("test_convnext", {}, 32),
    ],
)
def test_a_cut_of_timms_networks_computes_as_without_the_features(
    name: str, kwargs: dict[str, Any], size: int
) -> None:
    """What is cut away is set to 0 in a whole copy, at its readers: the outputs are the same."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval().double()
    features = features_of(model, 1, 3, size, size)
    removed = every_other(features)
    cut = cut_of(features, removed, name)
    assert cut.kept and len(Cut.model_validate_json(cut.model_dump_json()).kept) == len(cut.kept)
    smaller = copy.deepcopy(model)
    apply_cut(smaller, cut)
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for reading in features.readings:
            gone = removed[features.roots(reading.labels)]
            weight = features.program.parameters[reading.step.args[1].name]
            silent.get_parameter(weight)[:, gone] = 0
        images = torch.randn(2, 3, size, size, dtype=torch.float64)
        # Sums of a few hundred terms in float64, in another order.
        torch.testing.assert_close(smaller(images), silent(images), rtol=1e-10, atol=1e-12)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    assert after < 0.8 * before
    # The same cut of the model on the meta device, and of its weights by name.
    with torch.device("meta"):
        shapes = timm.create_model(name, num_classes=5, **kwargs)
    apply_cut(shapes, cut)
    state = cut.of_state(model.state_dict())
    assert {k: v.shape for k, v in shapes.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    assert all(torch.equal(v, state[k]) for k, v in smaller.state_dict().items())


def test_a_cut_of_a_cut_is_one_cut() -> None:
    model = mlp()
    first = Cut(kept=_layer("0", 8, [1, 3, 4, 6], "2"))
    second = Cut(kept=_layer("0", 4, [0, 2], "2") | {"4.weight": {1: Kept(of=5, indices=[4])}})
    step_by_step, at_once = copy.deepcopy(model), copy.deepcopy(model)
    apply_cut(step_by_step, first)
    apply_cut(step_by_step, second)
    both = first.then(second)
    apply_cut(at_once, both)
    assert both.kept["0.weight"][0].indices == [1, 4]
    assert all(
        torch.equal(a, b)
        for a, b in zip(step_by_step.parameters(), at_once.parameters(), strict=True)
    )
    with pytest.raises(ExportError, match="a cut of 8 features cannot follow one that leaves 4"):
        first.then(first)


def _layer(layer: str, of: int, indices: list[int], reader: str) -> dict[str, dict[int, Kept]]:
    kept = Kept(of=of, indices=indices)
    return {f"{layer}.weight": {0: kept}, f"{layer}.bias": {0: kept}, f"{reader}.weight": {1: kept}}


@pytest.mark.parametrize("indices", [[], [2, 1], [1, 1], [-1, 2], [0, 8]])
def test_indices_that_are_none_are_refused(indices: list[int]) -> None:
    with pytest.raises(ValidationError):
        Kept(of=8, indices=indices)


@pytest.mark.parametrize(
    ("cut", "sentence"),
    [
        (
            Cut(kept={"7.weight": {0: Kept(of=8, indices=[0])}}),
            "7.weight, which the model",
        ),
        (Cut(kept={"0.weight": {0: Kept(of=9, indices=[0])}}), "0.weight is 8 in the model, 9 in"),
        (Cut(kept={"0.weight": {2: Kept(of=8, indices=[0])}}), "no dimension 2"),
        (Cut(groups={"7": 2}), "names a module 7"),
    ],
)
def test_a_cut_of_another_model_is_refused_and_the_model_stays(cut: Cut, sentence: str) -> None:
    model = mlp()
    with pytest.raises(ExportError, match=sentence):
        apply_cut(model, cut)
    assert [p.shape for p in model.parameters()] == [p.shape for p in mlp().parameters()]


def test_random_weights_keep_the_variance_of_what_they_feed() -> None:
    """PyTorch draws a Linear by its fan-in: after a cut as the smaller layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 4000), nn.ReLU(), nn.Linear(4000, 300))
    kept = Kept(of=4000, indices=list(range(0, 4000, 10)))
    before = inputs_of_layers(model)
    apply_cut(model, Cut(kept={"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}}))
    keep_variance(model, before)
    fresh = nn.Linear(400, 300)
    smaller: Any = model[2]
    # 120,000 numbers: their standard deviation is known to 0.2 %.
    assert float((smaller.weight.std() / fresh.weight.std()).detach()) == pytest.approx(1, abs=0.01)
    # 300 numbers: to 4 %.
    assert float((smaller.bias.std() / fresh.bias.std()).detach()) == pytest.approx(1, abs=0.15)
    assert float(smaller.weight.detach().abs().max()) <= 1 / 400**0.5 + 1e-6
