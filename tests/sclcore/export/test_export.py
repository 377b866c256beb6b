"""What is exported can be read by others, and a failed export leaves nothing behind."""

from __future__ import annotations

import csv
import io
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import sclcore.export.plain
from sclcore import SCL, connection_groups, layer_budgets, weight_uses
from sclcore.export import ExportError, budgets_csv, save_sparse_model
from tests.sclcore.nets import Mixed, mixed_batches, mlp, mlp_batches, train


@pytest.fixture
def trained() -> tuple[nn.Module, SCL]:
    model = Mixed()
    optimizer = SCL(connection_groups(model), lr=0.05, lam=0.3, mask_lr=0.02)
    train(model, optimizer, mixed_batches(torch.float32) * 4)
    assert not all(bool(m.all()) for m in optimizer.masks().values())
    return model, optimizer


def _zeros_by_hand(path: Path) -> dict[str, int]:
    """Zeros of each float32 tensor, read from the bytes as the safetensors format says."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    zeros = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        begin, end = entry["data_offsets"]
        values = struct.unpack(f"<{(end - begin) // 4}f", body[begin:end])
        zeros[name] = sum(v == 0 for v in values)
    return zeros


def test_export_loads_into_an_unmodified_model(
    trained: tuple[nn.Module, SCL], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model, optimizer = trained
    path = save_sparse_model(model, tmp_path / "model.safetensors", masks=optimizer.masks())
    fresh = Mixed()
    fresh.load_state_dict(load_file(path))
    x = mixed_batches(torch.float32, 1)[0][0]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_zeros_in_the_file_are_those_of_the_masks(
    trained: tuple[nn.Module, SCL], tmp_path: Path
) -> None:
    model, optimizer = trained
    path = save_sparse_model(model, tmp_path / "model.safetensors", masks=optimizer.masks())
    zeros = _zeros_by_hand(path)
    for name, mask in optimizer.masks().items():
        assert zeros[name] == int((~mask).sum()), name


def test_metadata_is_kept_as_json(tmp_path: Path) -> None:
    metadata = {"density": 0.1, "recipe": {"lam": 0.3}}
    path = save_sparse_model(mlp(), tmp_path / "m.safetensors", metadata=metadata)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert json.loads(header["__metadata__"]["scl"]) == metadata


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    metadata = {key: key for key in "abcdefgh"}
    files = [
        save_sparse_model(mlp(), tmp_path / f"{i}.safetensors", metadata=metadata).read_bytes()
        for i in range(5)
    ]
    assert len(set(files)) == 1


def test_channels_last_and_tied_weights_are_written_plainly(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = load_file(save_sparse_model(model, tmp_path / "m.safetensors"))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_a_mask_that_disagrees_is_an_error_and_leaves_no_file(
    trained: tuple[nn.Module, SCL], tmp_path: Path
) -> None:
    model, optimizer = trained
    masks = optimizer.masks()
    live = masks["conv.weight"].nonzero()[0]
    masks["conv.weight"][tuple(live)] = False  # says pruned where the weight is not 0
    with pytest.raises(ExportError, match=r"conv\.weight has non-zero weights"):
        save_sparse_model(model, tmp_path / "model.safetensors", masks=masks)
    assert list(tmp_path.iterdir()) == []


def test_a_mask_for_a_tensor_the_model_lacks_is_an_error(tmp_path: Path) -> None:
    masks = {"nobody.weight": torch.zeros(2, 2, dtype=torch.bool)}
    with pytest.raises(ExportError, match="nobody"):
        save_sparse_model(mlp(), tmp_path / "model.safetensors", masks=masks)
    assert list(tmp_path.iterdir()) == []


def test_a_mask_of_another_shape_is_an_error(tmp_path: Path) -> None:
    masks = {"0.weight": torch.ones(3, 3, dtype=torch.bool)}
    with pytest.raises(ExportError, match=r"0\.weight"):
        save_sparse_model(mlp(), tmp_path / "model.safetensors", masks=masks)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_keeps_the_previous_file(
    trained: tuple[nn.Module, SCL], tmp_path: Path
) -> None:
    model, optimizer = trained
    path = save_sparse_model(model, tmp_path / "model.safetensors", masks=optimizer.masks())
    before = path.read_bytes()
    with torch.no_grad():
        model.get_parameter("conv.weight").fill_(1.0)
    with pytest.raises(ExportError):
        save_sparse_model(model, path, masks=optimizer.masks())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_write_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(state: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half a head")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sclcore.export.plain, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_sparse_model(mlp(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_differently_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = sclcore.export.plain.save_file

    def flip_a_bit(state: object, path: Path, metadata: object = None) -> None:
        write(state, path, metadata=metadata)  # type: ignore[arg-type]
        data = bytearray(Path(path).read_bytes())
        data[-1] ^= 1
        Path(path).write_bytes(bytes(data))

    monkeypatch.setattr(sclcore.export.plain, "save_file", flip_a_bit)
    with pytest.raises(ExportError, match="reads back with other values"):
        save_sparse_model(mlp(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_bf16_models_are_exported_as_they_are(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = mlp().bfloat16()
    optimizer = SCL(connection_groups(model), lr=0.05, lam=0.3, mask_lr=0.02)
    train(model, optimizer, [(x.bfloat16(), y.bfloat16()) for x, y in mlp_batches(40)])
    path = save_sparse_model(model, tmp_path / "m.safetensors", masks=optimizer.masks())
    state = load_file(path)
    for name, value in model.state_dict().items():
        assert state[name].dtype == torch.bfloat16 and torch.equal(state[name], value)


def test_budgets_csv(trained: tuple[nn.Module, SCL]) -> None:
    model, optimizer = trained
    uses = weight_uses(model, torch.zeros(1, 2, 6, 6))
    budgets = layer_budgets(model, uses, optimizer.masks())
    text = budgets_csv(budgets)
    assert "\r" not in text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [r["layer"] for r in rows] == list(optimizer.masks())
    for row in rows:
        p = model.get_parameter(row["layer"])
        live = int(p.count_nonzero())
        assert row["shape"] == "x".join(str(s) for s in p.shape)
        assert (int(row["connections"]), int(row["live"])) == (p.numel(), live)
        assert float(row["density"]) == pytest.approx(live / p.numel(), abs=1e-6)
        assert int(row["macs"]) == round(uses[row["layer"]] * live)
        assert int(row["macs_dense"]) == round(uses[row["layer"]] * p.numel())
