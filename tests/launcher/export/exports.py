"""What the tests of `scl export` share: its command, and readers that are not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from launcher.cli import main
from launcher.models import SmallConvNet

Output = pytest.CaptureFixture[str]


def network(run: Path) -> nn.Module:
    """The model of a run of the small ConvNet, built by hand."""
    kwargs = yaml.safe_load((run / "recipe.yaml").read_text())["model"]["kwargs"]
    model = SmallConvNet(num_classes=10, in_chans=1, **kwargs)
    model.load_state_dict(load_file(run / "model.safetensors"))
    return model.eval()


def images(batch: int, channels: int = 1, size: int = 8) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def in_onnxruntime(path: Path, batch: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])


def live_of(state: dict[str, Tensor]) -> int:
    return sum(int(torch.count_nonzero(v)) for v in state.values() if v.ndim > 1)


def export(source: Path, out: Path, formats: str, *more: str) -> dict[str, Any]:
    assert main(["export", str(source), "--format", formats, "--out", str(out), *more]) == 0
    return json.loads((out / "export.json").read_text())


def refused(capsys: Output, *arguments: str | Path, code: int = 2) -> str:
    """The one sentence that `scl export` with these arguments ends with."""
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == code
    [line] = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    return line
