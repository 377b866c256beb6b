"""Batch norms become part of the layer before them: equal outputs, zeros stay zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sclcore.export import ExportError
from sclcore.export.folding import fold_batch_norm
from tests.sclcore.pruned import as_trained, network

# As in test_removal_networks: sums of 10³ terms through 10² layers, in float64.
TOLERANCE = 1e-12


def folds(model: nn.Module, shape: tuple[int, ...]) -> tuple[Any, list[str], dict[str, str]]:
    model = model.double().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result, folded, left = fold_batch_norm(model, torch.zeros(shape))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected, found = model(x), result(x)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * scale)
    for name, weight in result.state_dict().items():
        if name.endswith("weight") and weight.ndim > 1:
            assert int((weight != 0).sum()) <= int((before[name] != 0).sum()), name
            assert torch.count_nonzero(weight[before[name] == 0]) == 0, name
    norms = {n for n, m in result.named_modules() if isinstance(m, _BatchNorm)}
    assert norms == set(left)
    assert not norms & set(folded)
    return result, folded, left


@pytest.mark.parametrize(
    ("name", "count", "left_count"),
    [("small_convnet", 3, 0), ("mobilenetv2_100", 52, 0), ("densenet121", 13, 16)],
)
def test_of_known_networks(name: str, count: int, left_count: int) -> None:
    """MobileNetV2 has norm and activation in one module; DenseNet norms before convolutions."""
    result, folded, left = folds(network(name, seed=0), (2, 3, 32, 32))
    assert (len(folded), len(left)) == (count, left_count)
    assert not any(isinstance(m, BatchNormAct2d) for m in result.modules()) or left
    for reason in left.values():
        assert "what comes before it is no convolution" in reason


class Obstacles(nn.Module):
    """One batch norm for each reason to leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 1)
        self.shared = nn.BatchNorm2d(4)
        self.fork = nn.Conv2d(4, 4, 1)
        self.beside = nn.BatchNorm2d(4)
        self.batch = nn.BatchNorm2d(4, track_running_stats=False)
        self.linear = nn.Linear(4, 4)
        self.tokens = nn.BatchNorm1d(9)
        self.head = nn.Linear(4, 4, bias=False)
        self.plain = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.conv(self.first(x)))
        x = self.shared(self.conv(x[:, :3]))
        fork = self.fork(x)
        x = self.batch(self.conv(x[:, :3])) + self.beside(fork) + fork
        tokens = self.tokens(self.linear(x.flatten(2).transpose(1, 2)))
        return self.plain(self.head(tokens.mean(1)))


def test_what_does_not_fit_is_left_with_the_reason() -> None:
    model = Obstacles()
    as_trained(model)
    result, folded, left = folds(model, (5, 3, 3, 3))
    assert folded == ["plain"]
    assert result.head.bias is not None
    assert left == {
        "first": "it normalises the network's input",
        "shared": "it or the layer before it is used several times",
        "beside": "others read the layer before it too",
        "batch": "it takes the statistics of the batch, not stored ones",
        "tokens": "its channels are not the features of the linear layer before it",
    }


def test_a_network_that_decides_by_values_is_refused() -> None:
    class Deciding(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ExportError, match="Deciding cannot be traced"):
        fold_batch_norm(Deciding(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), torch.zeros(1, 1, 2, 2))
