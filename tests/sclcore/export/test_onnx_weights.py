"""Which tensors of an ONNX file are the model's weights, and whether their zeros are all there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from sclcore.export import ExportError, save_onnx
from sclcore.export.graphs import live_of_onnx
from sclcore.network.connections import find_connections


def _mvitv2() -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    cfg = MultiScaleVitCfg(
        depths=(1, 1), embed_dim=(16, 32), num_heads=(1, 2), stride_q=((1, 1),) * 2
    )
    return MultiScaleVit(cfg, img_size=(32, 32), num_classes=5)


def _of_timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **kwargs)


_SWIN = {"window_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
# Networks whose graphs hold constants that no state has: biases of windows, masks, positions.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "eva02": (
        _of_timm("eva02_tiny_patch14_224", img_size=28, depth=1, embed_dim=48, num_heads=3),
        28,
    ),
    "swin": (_of_timm("swin_tiny_patch4_window7_224", img_size=32, **_SWIN), 32),
    "levit": (_of_timm("levit_128s", img_size=64), 64),
    "xcit": (_of_timm("xcit_nano_12_p16_224", img_size=32, depth=2, embed_dim=32, num_heads=2), 32),
    "mvitv2": (_mvitv2, 32),
    "gcvit": (_of_timm("gcvit_xxtiny", img_size=64), 64),
}


@pytest.mark.parametrize(
    "name", ["eva02", *(pytest.param(n, marks=pytest.mark.long) for n in [*NETWORKS][1:])]
)
def test_constants_of_a_graph_are_no_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model = build().eval()
    connections = find_connections(model)
    with torch.no_grad():
        for connection in connections:
            connection.parameter.mul_(torch.rand_like(connection.parameter) < 0.3)
    compared = save_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, size, size))
    # XCiT's positions are a product of constants, which the file holds as one.
    live = sum(
        int(torch.count_nonzero(c.parameter)) for c in connections if "pos_embed" not in c.name
    )
    state = model.state_dict().values()
    matrices = sum(int(torch.count_nonzero(v)) for v in state if sum(n > 1 for n in v.shape) > 1)
    # All of these, and of the other matrices (position biases) those that were not folded.
    assert live <= compared.live <= matrices


def _holding(**tensors: np.ndarray) -> Any:
    from onnx import helper, numpy_helper

    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    return helper.make_model(helper.make_graph([], "graph", [], [], initializers))


def test_weights_are_known_by_name_and_by_value() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight[0] = 0  # type: ignore[index]
        model[1].weight.zero_()  # type: ignore[arg-type]
        model[2].weight.zero_()  # type: ignore[arg-type]
    weight = model[0].weight.detach().numpy()  # type: ignore[union-attr]
    constant = np.ones((5, 5), np.float32)
    transposed = np.ascontiguousarray(weight.T)
    both_dead = np.zeros((3, 4), np.float32)
    assert live_of_onnx(_holding(val_1=transposed, val_2=both_dead, c=constant), model, "f") == 9
    named = {"0.weight": weight / 2, "1.weight": both_dead, "c": constant}
    assert live_of_onnx(_holding(**named), model, "f") == 9
    dense = {"0.weight": np.ones((4, 3), np.float32), "1.weight": both_dead}
    with pytest.raises(ExportError, match=r"f holds 12 live weights of 0\.weight, the model 9"):
        live_of_onnx(_holding(**dense), model, "f")
    assert live_of_onnx(_holding(val_2=both_dead, c=constant), model, "f") == 0
