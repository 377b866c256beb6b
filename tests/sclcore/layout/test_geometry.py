"""Features, units and N:M blocks of flattened tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sclcore.layout.geometry import Geometry, geometry_of, parse_n_m
from sclcore.network.connections import find_connections
from tests.sclcore.oracle import connections_of


@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Linear(5, 3)]
)
def test_runs_belong_to_the_output_features(module: nn.Module) -> None:
    connection = find_connections(module)[0]
    weight = connection.parameter.detach()
    tensor = Geometry("weight", tuple(weight.shape), connection.transposed_groups)
    per_run = weight.reshape(-1, tensor.run).sum(1)
    owners = tensor.feature_of_run
    if owners is None:
        owners = torch.arange(tensor.features)
    sums = torch.zeros(tensor.features).index_add_(0, owners, per_run)
    expected = [weight[i].sum() for i in connections_of(module)["weight"]]
    assert torch.allclose(sums, torch.stack(expected))
    for number in range(tensor.numel):
        assert tensor.feature_of_unit(number) == owners[number // tensor.run]


def group(shape: tuple[int, ...], **options: object) -> dict[str, object]:
    values = {"granularity": "weight", "n_m": None, "transposed_groups": 0, **options}
    return {"names": ["layer"], **{key: [value] for key, value in values.items()}}


@pytest.mark.parametrize(
    ("granularity", "shape", "unit", "variables"),
    [
        ("weight", (6, 4, 3, 3), 1, 36),
        ("kernel", (6, 4, 3, 3), 9, 4),
        ("feature", (6, 4, 3, 3), 36, 1),
        ("kernel", (6, 4), 1, 4),
        ("feature", (6, 4), 4, 1),
    ],
)
def test_units(granularity: str, shape: tuple[int, ...], unit: int, variables: int) -> None:
    tensor = geometry_of(group(shape, granularity=granularity), 0, shape)
    assert (tensor.unit, tensor.variables_per_feature) == (unit, variables)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"granularity": "row"}, (4, 4), "unknown granularity 'row' for layer"),
        ({"granularity": "feature", "transposed_groups": 1}, (4, 4, 3, 3), "ConvTranspose"),
        ({"n_m": (2, 4)}, (4, 6), "has 6 input connections per feature, which 4 does not divide"),
        ({"n_m": (2, 4), "granularity": "feature"}, (4, 8), "2:4 needs the granularity weight"),
        ({"n_m": (2, 4), "transposed_groups": 1}, (4, 4, 2, 2), "cannot be 2:4"),
    ],
)
def test_what_a_tensor_cannot_have(
    options: dict[str, object], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        geometry_of(group(shape, **options), 0, shape)


def test_n_m() -> None:
    assert parse_n_m("2:4") == (2, 4)
    for text in ("4:2", "2:2", "0:4", "2", "a:b", "2:4:8"):
        with pytest.raises(ValueError, match="such as 2:4"):
            parse_n_m(text)
