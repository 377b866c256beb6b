"""`scl export --format ham,sham --share …` on a real run: few values, every bit of them back."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from launcher.cli import main
from launcher.models import SmallConvNet
from sclcore.export import load_compact, load_huffman
from sclcore.network.connections import find_connections
from tests.launcher.conftest import summary
from tests.launcher.export.exports import Output, export, images, logits, network, refused


@pytest.mark.parametrize(("share", "most_lost"), [("kmeans:16", 0.03), ("pq:32", 0.06)])
def test_shared_values_come_with_their_accuracy(
    share: str, most_lost: float, undisturbed: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "export"
    report = export(undisturbed, out, "ham,sham,safetensors", "--share", share)
    exact = network(undisturbed)
    weights = {c.name for c in find_connections(exact)}
    ham, sham = load_huffman(out / "model.ham"), load_huffman(out / "model.sham")
    for name, tensor in exact.state_dict().items():
        assert torch.equal(ham[name], sham[name]), name
        if name not in weights:
            assert torch.equal(ham[name], tensor), name
            continue
        assert torch.equal(ham[name] != 0, tensor != 0)
        values = tensor[tensor != 0].unique()
        # As many as it may have.
        most = min(int(share.split(":")[1]), len(values))
        assert len(ham[name][ham[name] != 0].unique()) == most
    assert summary(undisturbed)["top1"] == pytest.approx(report["accuracy"]["as trained"])
    lost = report["accuracy"]["as trained"] - report["accuracy"][f"shared, {share}"]
    assert abs(lost) <= most_lost
    model = SmallConvNet(width=8, norm="group")
    model.load_state_dict(sham)
    assert not torch.equal(logits(model.eval(), images(7)), logits(exact, images(7)))

    sizes = {size["what"]: size for size in report["sizes"]}
    assert list(sizes) == [
        *("dense", "dense, gzip", "ham", "ham, bound by formula"),
        *("sham", "sham, bound by formula"),
    ]
    for form in ("ham", "sham"):
        assert sizes[form]["bytes"] == (out / f"model.{form}").stat().st_size
        assert sizes[form]["bytes"] < sizes["dense, gzip"]["bytes"]
        # The bound leaves out the header.
        content = sizes[form]["positions"] + sizes[form]["values"]
        assert content < sizes[f"{form}, bound by formula"]["bytes"]
        more = report["files"][form]["more"]
        # The first layer, of 72 weights, is too small to gain from a dictionary of 32 values.
        assert more["share"] == share
        assert weights - more["layers"].keys() <= {"features.0.weight"}
        assert all(layer["psi"] < layer["psi_bound"] for layer in more["layers"].values())
        assert all(layer["psi"] < 1 for layer in more["layers"].values())
    said = capsys.readouterr().out
    assert f"top-1, shared, {share}: " in said and f"bit for bit what {share} shares" in said
    card = (out / "README.md").read_text()
    assert f"top-1 of the file, shared, {share}" in card


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_models_of_timm(name: str, tmp_path: Path) -> None:
    """Convolutions of all shapes, projections of attention; embeddings stay as they are."""
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {
        "resnet18": {"channels": [8, 16, 16, 32]},
        "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    }[name]
    model = timm.create_model(name, num_classes=5, **kwargs)
    with torch.no_grad():
        for connection in find_connections(model):
            connection.parameter.mul_(torch.rand_like(connection.parameter) < 0.3)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    more = ["--model", name, "--image-size", "32", "--share", "kmeans:8"]
    for key, value in kwargs.items():
        more += ["--kwarg", f"{key}={value}"]
    report = export(tmp_path / "w.safetensors", tmp_path / "out", "sham", *more)
    read = load_huffman(tmp_path / "out/model.sham")
    weights = {c.name for c in find_connections(model)}
    for key, value in model.state_dict().items():
        if key in weights:
            assert torch.equal(read[key] != 0, value != 0) and len(read[key].unique()) == 9, key
        else:
            assert torch.equal(read[key], value), key
    assert report["files"]["sham"]["more"]["layers"].keys() == weights


def test_what_was_exported_can_be_exported_again(undisturbed: Path, tmp_path: Path) -> None:
    """Also without --share: its values are few already. So it is with networks trained that way."""
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["data"]["path"] = "nowhere"
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    report = export(run, tmp_path / "first", "sham", "--share", "kmeans:8")
    assert report["accuracy"] == {}, "there are no shards to measure on"
    first = load_huffman(tmp_path / "first/model.sham")
    again = export(tmp_path / "first", tmp_path / "again", "ham,sham,safetensors")
    assert again["files"]["sham"]["more"]["share"] is None
    assert again["network"]["model"] == "small_convnet"
    for form in ("ham", "sham"):
        read = load_huffman(tmp_path / f"again/model.{form}")
        assert all(torch.equal(read[name], value) for name, value in first.items())
    assert again["source"]["file"].endswith("model.sham")


def test_the_card_says_how_to_load(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    export(undisturbed, out, "sham", "--share", "kmeans:16")
    [code] = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert "load_huffman('model.sham')" in code
    names: dict[str, torch.nn.Module] = {}
    exec(code.replace("'model.sham'", repr(str(out / "model.sham"))), names)
    assert logits(names["model"], images(2)).shape == (2, 10)


def test_the_lines_of_the_document(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs/formats.md").read_text()
    first, *others = (line.strip() for line in text.splitlines() if line.startswith("    scl exp"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits_scl").symlink_to(undisturbed)
    monkeypatch.chdir(tmp_path)
    [compact] = [line for line in others if "model.sham" in line]
    for command in (first, compact):
        assert main(shlex.split(command)[1:]) == 0
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"model": SmallConvNet(width=8, norm="group")}
    exec(code, names)
    weight = names["model"].classifier.weight
    assert names["outputs"].shape == (8, 10) and len(weight[weight != 0].unique()) == 16
    read = load_compact("runs/digits_shared_compact/model.sclc")
    assert torch.equal(read["classifier.weight"], weight)


def test_bad_input_is_one_sentence(undisturbed: Path, tmp_path: Path, capsys: Output) -> None:
    out = ["--out", tmp_path / "out"]
    for text in ("kmeans", "kmeans:", "kmeans:1", "kmeans:x", "pq:-4", "median:4", "pq:65537"):
        line = refused(capsys, undisturbed, "--format", "sham", "--share", text, *out)
        assert f"--share {text}: should be kmeans:N or pq:N with N from 2 to 65,536" in line
    assert "--share pq:8 changes ham and sham alone" in refused(
        capsys, undisturbed, "--format", "compact", "--share", "pq:8", *out
    )
    dense = tmp_path / "dense.safetensors"
    save_file(SmallConvNet(width=8).state_dict(), dense)
    named = [dense, "--model", "small_convnet", "--kwarg", "width=8", "--image-size", "8", *out]
    line = refused(capsys, *named, "--format", "ham")
    assert "--format ham: no layer would be smaller so, with so many different weights" in line
    assert "let them share values, with --share kmeans:32" in line
    line = refused(capsys, *named, "--format", "csv,sham", "--share", "pq:65536")
    assert "let them share values, with fewer values than --share pq:65536" in line
    torn = tmp_path / "torn.sham"
    export(undisturbed, tmp_path / "whole", "sham", "--share", "pq:8")
    torn.write_bytes((tmp_path / "whole/model.sham").read_bytes()[:-9])
    assert "torn.sham is damaged: its checksum does not match" in refused(
        capsys, torn, "--format", "csv", *out
    )
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "torn.sham", dense.name}
