"""`scl export` on networks of timm, and 2:4."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sclcore import SCL, connection_groups
from sclcore.export import load_compact
from sclcore.network.connections import find_connections
from tests.launcher.export.exports import (
    Output,
    export,
    images,
    in_onnxruntime,
    logits,
    refused,
)

SMALL_TIMM = {
    "resnet18": {"channels": [16, 32, 64, 128]},
    "mobilenetv2_100": {},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "convnext_atto": {"depths": [1, 1, 2, 1]},
}


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL_TIMM)
def test_models_of_timm(name: str, tmp_path: Path) -> None:
    """Random masks and statistics; read by timm itself, onnxruntime and torch.export."""
    torch.manual_seed(0)
    kwargs: dict[str, Any] = SMALL_TIMM[name]
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # As if trained: timm starts with factors of 0, which would hide what is before.
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        for connection in find_connections(model):
            connection.parameter.mul_(torch.rand_like(connection.parameter) < 0.3)
    source = tmp_path / "given.safetensors"
    save_file({k: v.clone() for k, v in model.state_dict().items()}, source)
    more = ["--model", name, "--image-size", "32"]
    for key, value in kwargs.items():
        more += ["--kwarg", f"{key}={value}"]
    out = tmp_path / "export"
    report = export(source, out, "safetensors,onnx,torch,compact,csv", *more)
    batch = images(3, 3, 32)
    expected = logits(model, batch)
    theirs = timm.create_model(
        name, num_classes=5, checkpoint_path=str(out / "model.safetensors"), **kwargs
    )
    assert torch.equal(logits(theirs.eval(), batch), expected)
    theirs.load_state_dict(load_compact(out / "model.sclc"))
    assert torch.equal(logits(theirs, batch), expected)
    scale = expected.abs().max()
    assert (in_onnxruntime(out / "model.onnx", batch) - expected).abs().max() < 1e-4 * scale
    program = torch.export.load(out / "model.pt2").module()
    assert (logits(program, batch) - expected).abs().max() < 1e-5 * scale  # type: ignore[arg-type]
    live = sum(int(torch.count_nonzero(c.parameter)) for c in find_connections(model))
    assert report["live"] == live < 0.35 * report["connections"]
    files = report["files"]
    assert files["onnx"]["more"]["live"] == files["torch"]["more"]["live"] >= live


@pytest.fixture(scope="session")
def two_of_four(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision transformer trained with 2:4 in its blocks, as a run would leave it."""
    folder = tmp_path_factory.mktemp("two_of_four")
    kwargs: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 64}
    kwargs |= {"depth": 1, "num_heads": 4}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, **kwargs)
    patterns = {"blocks.*": "2:4"}
    optimizer = SCL(connection_groups(model, n_m=patterns), lr=0.01, lam=0.1)
    for _ in range(3):
        model(images(8)).square().mean().backward()
        optimizer.step()
    save_file(model.state_dict(), folder / "model.safetensors")
    values = yaml.safe_load(recipe.read_text())
    values |= {
        "model": {"name": "vit_tiny_patch16_224", "kwargs": kwargs},
        "method": {"name": "scl", "lam": 0.1, "n_m": patterns},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    (folder / "metrics.jsonl").touch()
    return folder


def _most_live_of_four(weight: Tensor) -> int:
    return max(int(np.count_nonzero(block)) for block in weight.numpy().reshape(-1, 4))


def test_2_to_4_is_verified_layer_by_layer(
    two_of_four: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "export"
    report = export(two_of_four, out, "2:4")
    holds = {p["name"] for p in report["2:4"] if p["holds"]}
    assert holds == {
        f"blocks.0.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert {p["name"] for p in report["2:4"] if p["qualifies"]} == holds
    state = load_file(out / "model.2to4.safetensors")
    original = load_file(two_of_four / "model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in original.items())
    assert all(_most_live_of_four(state[name]) <= 2 for name in holds)
    said = capsys.readouterr().out
    assert "Not measured here: needs a GPU" in said and "2:4 holds in 4 of 6 layers" in said

    torn = Path(shutil.copytree(two_of_four, tmp_path / "torn"))
    original["blocks.0.mlp.fc1.weight"][0, :4] = 1
    save_file(original, torn / "model.safetensors")
    line = refused(capsys, torn, "--format", "2:4", "--out", tmp_path / "no", code=1)
    assert "blocks.0.mlp.fc1.weight was trained as 2:4, and 1 of its 4,096 blocks" in line
    assert not (tmp_path / "no").exists()


def test_2_to_4_by_magnitude_only_when_asked(
    two_of_four: Path, tmp_path: Path, capsys: Output
) -> None:
    dense = Path(shutil.copytree(two_of_four, tmp_path / "dense"))
    values = yaml.safe_load((dense / "recipe.yaml").read_text()) | {"method": {"name": "dense"}}
    (dense / "recipe.yaml").write_text(yaml.safe_dump(values))
    state = load_file(dense / "model.safetensors")
    for name, value in state.items():
        if name.startswith("blocks.0.") and value.ndim == 2:
            state[name] = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    save_file(state, dense / "model.safetensors")
    line = refused(capsys, dense, "--format", "2:4", "--out", tmp_path / "no")
    assert "no layer is 2:4" in line and "--convert-2to4" in line
    report = export(dense, tmp_path / "export", "2:4", "--convert-2to4")
    assert report["accuracy"].keys() == {"as trained", "2:4, converted"}
    read = load_file(tmp_path / "export/model.2to4.safetensors")
    for name, value in state.items():
        if not (name.startswith("blocks.0.") and value.ndim == 2):
            assert torch.equal(read[name], value), name
            continue
        for kept, block in zip(
            read[name].numpy().reshape(-1, 4)[:200], value.numpy().reshape(-1, 4), strict=False
        ):
            largest = sorted(range(4), key=lambda i: -abs(block[i]))[:2]
            assert [i for i in range(4) if kept[i]] == sorted(largest)
            assert all(kept[i] == block[i] for i in largest)
        assert report["files"]["2:4"]["more"]["lost"][name] == value.numel() // 2
    values["data"]["path"] = "nowhere"
    (dense / "recipe.yaml").write_text(yaml.safe_dump(values))
    line = refused(capsys, dense, "--format", "2:4", "--convert-2to4", "--out", tmp_path / "no")
    assert "name them with --data" in line and not (tmp_path / "no").exists()
