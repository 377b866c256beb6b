"""`scl export` on a real run: what it writes is read by others, and is the same network."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import sklearn.datasets
import torch
import yaml
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launcher.cli import main
from launcher.export.asked import FORMATS
from launcher.export.formats import WRITERS
from launcher.models import SmallConvNet
from sclcore.export import load_compact
from tests.launcher.conftest import summary
from tests.launcher.export.exports import (
    Output,
    export,
    images,
    in_onnxruntime,
    live_of,
    logits,
    network,
)


def test_formats_that_can_be_asked_for_are_those_that_can_be_written() -> None:
    assert tuple(WRITERS) == FORMATS


def test_a_run_in_every_format(undisturbed: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "export"
    report = export(undisturbed, out, "safetensors,state_dict,onnx,torch,csv,compact")
    model, found = network(undisturbed), summary(undisturbed)
    expected = {batch: logits(model, images(batch)) for batch in (1, 7)}

    with safe_open(out / "model.safetensors", framework="pt") as file:
        plain = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for state in (
        plain,
        torch.load(out / "model.pt", weights_only=True),
        load_compact(out / "model.sclc"),
    ):
        fresh = SmallConvNet(width=8, norm="group")
        fresh.load_state_dict(state)
        assert torch.equal(logits(fresh.eval(), images(7)), expected[7])
        assert live_of(state) == found["live"]
    program = torch.export.load(out / "model.pt2").module()
    onnx.checker.check_model(out / "model.onnx", full_check=True)
    for batch, wanted in expected.items():
        # Float32 sums in another order: 1e-6 of the largest output was seen, 1e-4 is allowed.
        for other in (
            logits(program, images(batch)),  # type: ignore[arg-type]
            in_onnxruntime(out / "model.onnx", images(batch)),
        ):
            assert (other - wanted).abs().max() < 1e-5 * wanted.abs().max()
    written = onnx.load(out / "model.onnx")
    for value in (*written.graph.input, *written.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    weights = [
        numpy_helper.to_array(t)
        for t in written.graph.initializer
        if sum(d > 1 for d in t.dims) > 1
    ]
    assert sum(int(np.count_nonzero(w)) for w in weights) == found["live"]
    assert [o.version for o in written.opset_import if o.domain == ""] == [20]

    rows = list(csv.DictReader((out / "layers.csv").open()))
    assert sum(int(row["live"]) for row in rows) == found["live"] == report["live"]
    assert sum(int(row["macs"]) for row in rows) == found["macs"] == report["macs"]
    assert report["source"] | {"file": "", "run": ""} == {
        "file": "", "run": "", "step": None, "finished": True,
    }  # fmt: skip
    for file in report["files"].values():
        assert file["bytes"] == (out / file["file"]).stat().st_size
    names = {file["file"] for file in report["files"].values()}
    found_names = {path.name for path in out.iterdir()}
    assert found_names == {*names, "export.json", "README.md", "summary.png"}
    said = capsys.readouterr().out
    assert f"{found['live']:,} of {found['connections']:,} connections live" in said
    assert "zeros are stored and multiplied like other numbers" in said
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_sizes_are_those_of_the_files(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    report = export(undisturbed, out, "compact,safetensors")
    sizes = {size["what"]: size for size in report["sizes"]}
    gzip = subprocess.run(
        ["gzip", "-9", "-n", "-c", out / "model.safetensors"], capture_output=True, check=True
    )
    # A dozen bytes of zlib's and gzip's own between them.
    assert abs(sizes["dense, gzip"]["bytes"] - len(gzip.stdout)) < 64
    assert sizes["compact"]["bytes"] == (out / "model.sclc").stat().st_size
    assert sizes["compact"]["bytes"] < sizes["dense, gzip"]["bytes"] < sizes["dense"]["bytes"]
    state = load_file(out / "model.safetensors")
    # By hand: n · H(p) and four bytes a live weight; other tensors as they are.
    positions = values = 0.0
    for tensor in state.values():
        live, size = int(torch.count_nonzero(tensor)), tensor.numel()
        share = np.array([live, size - live]) / size
        positions += size * float(-(share[share > 0] * np.log2(share[share > 0])).sum()) / 8
        values += live * tensor.element_size()
    bound = sizes["entropy bound"]
    assert bound["positions"] == round(positions) and bound["values"] == round(values)
    assert sizes["compact"]["positions"] < 1.1 * bound["positions"] + 16


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_rounded_values_come_with_their_accuracy(
    values: str, undisturbed: Path, tmp_path: Path
) -> None:
    report = export(undisturbed, tmp_path / "export", "compact", "--values", values)
    assert report["accuracy"]["as trained"] == pytest.approx(summary(undisturbed)["top1"])
    assert abs(report["accuracy"][f"compact, {values}"] - report["accuracy"]["as trained"]) < 0.05
    read, exact = load_compact(tmp_path / "export/model.sclc"), network(undisturbed).state_dict()
    steps = {"float16": 2.0**-11, "int8": 0.5 / 127}
    for name, weight in exact.items():
        if weight.ndim < 2:
            assert torch.equal(read[name], weight)
            continue
        largest = weight.abs().flatten(1).amax(1)
        error = (read[name] - weight).abs().flatten(1).amax(1)
        assert bool((error <= steps[values] * largest * 1.001 + 1e-7).all())
        assert bool(((read[name] == 0) | (weight != 0)).all())


def test_an_unfinished_run_gives_its_newest_checkpoint(
    undisturbed: Path, tmp_path: Path, capsys: Output
) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    for name in ("model.safetensors", "layers.csv", "summary.json", "summary.png"):
        (run / name).unlink()
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    shutil.rmtree(newest)
    older = sorted((run / "checkpoints").glob("step-*"))[-1]
    report = export(run, tmp_path / "export", "safetensors")
    step = int(older.name.removeprefix("step-"))
    assert report["source"]["step"] == step and report["source"]["finished"] is False
    assert f"not finished: as it was at step {step}" in capsys.readouterr().out
    state = torch.load(older / "model.pt", weights_only=True)
    read = load_file(tmp_path / "export/model.safetensors")
    assert all(torch.equal(read[name], value) for name, value in state.items())
    # The checkpoint by its own name is the same, and what was exported can be exported again.
    for source in (older, tmp_path / "export"):
        again = tmp_path / f"again-{source.name}"
        assert export(source, again, "compact")["source"]["finished"] is False
        assert all(torch.equal(load_compact(again / "model.sclc")[n], v) for n, v in read.items())


def test_dead_features_are_left_out_of_graphs(undisturbed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    (run / "layers.csv").unlink()
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["model"]["kwargs"]["norm"] = "batch"
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    torch.manual_seed(0)
    state = SmallConvNet(width=8).state_dict()
    # Three filters without a connection, whose constant the ReLU takes away; a fourth nobody reads.
    state["features.3.weight"][:3] = 0
    state["features.4.bias"][:3] = -1
    state["features.7.weight"][:, 4] = 0
    save_file(state, run / "model.safetensors")
    out = tmp_path / "export"
    report = export(run, out, "onnx,torch,safetensors", "--remove-dead", "--fold-bn")
    model = network(run)
    expected = logits(model, images(5))
    for found in (
        in_onnxruntime(out / "model.onnx", images(5)),
        logits(torch.export.load(out / "model.pt2").module(), images(5)),  # type: ignore[arg-type]
    ):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    removed = report["changes"]["removed"]
    assert removed["features_before"] - removed["features_after"] >= 4
    assert removed["parameters_after"] < removed["parameters_before"]
    assert len(report["changes"]["folded"]) == 3
    nodes = {node.op_type for node in onnx.load(out / "model.onnx").graph.node}
    assert "BatchNormalization" not in nodes
    shapes = [v.shape for v in torch.export.load(out / "model.pt2").state_dict.values()]
    assert torch.Size([16, 8, 3, 3]) not in shapes
    # What timm loads keeps its shapes.
    assert all(
        torch.equal(value, state[name])
        for name, value in load_file(out / "model.safetensors").items()
    )


def test_the_five_lines_of_the_document(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written: the command, then the Python, on the digits that this run was trained on."""
    text = (Path(__file__).resolve().parents[3] / "docs/export.md").read_text()
    five_lines, tensor_cores, compact = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    command = next(line.strip() for line in text.splitlines() if line.startswith("    scl "))
    assert len([line for line in five_lines.splitlines() if line]) == 4
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits_scl").symlink_to(undisturbed)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    names: dict[str, Any] = {}
    exec(five_lines, names)
    _, labels = sklearn.datasets.load_digits(return_X_y=True)
    right = float((names["logits"].argmax(1) == labels).mean())
    # All digits, of which those of the validation split are a fifth.
    assert len(names["logits"]) == 1797 and right > summary(undisturbed)["top1"] - 0.05
    expected = logits(network(undisturbed), torch.from_numpy(names["images"]).float())
    assert np.abs(names["logits"] - expected.numpy()).max() < 1e-4 * float(expected.abs().max())
    about = json.loads(Path("runs/digits_onnx/export.json").read_text())["network"]
    assert f"{about['mean'][0]:.6g}" in five_lines and f"{about['std'][0]:.6g}" in five_lines
    # One needs a GPU; at least it is Python.
    compile(tensor_cores, "docs/export.md", "exec")
    export(Path("runs/digits_scl"), Path("runs/digits_export"), "compact")
    exec(compact, {"model": SmallConvNet(width=8, norm="group")})
