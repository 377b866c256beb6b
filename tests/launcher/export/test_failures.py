"""`scl export` that cannot be done: one sentence, and no half of an export."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

import launcher.export.asked
import sclcore.export.graphs
from tests.launcher.conftest import launch, scl, wait_until
from tests.launcher.export.exports import (
    Output,
    export,
    refused,
)


def test_bad_input_is_one_sentence(
    undisturbed: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--out", tmp_path / "out"]
    assert "there is no format 'onx'; did you mean onnx?" in refused(
        capsys, undisturbed, "--format", "onx", *out
    )
    assert f"there is no {tmp_path / 'gone'}" in refused(
        capsys, tmp_path / "gone", "--format", "csv", *out
    )
    (tmp_path / "empty").mkdir()
    assert "holds no model and no checkpoint" in refused(
        capsys, tmp_path / "empty", "--format", "csv", *out
    )
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((undisturbed / "model.safetensors").read_bytes()[:500])
    assert "cannot be read as a model" in refused(capsys, torn, "--format", "csv", *out)
    bare, model = tmp_path / "bare.safetensors", load_file(undisturbed / "model.safetensors")
    save_file(model | {"teacher.weight": torch.ones(2)}, bare)
    assert "does not say of which model it is" in refused(capsys, bare, "--format", "csv", *out)
    named = [bare, "--model", "small_convnet", "--kwarg", "width=8", "--kwarg", "norm=group"]
    named += ["--format", "csv", *out]
    assert "the model has no teacher.weight" in refused(capsys, *named)
    save_file(model, bare)
    assert "the size of its images: give it with --image-size" in refused(capsys, *named)
    assert "--kwarg =9: should be KEY=VALUE" in refused(capsys, *named, "--kwarg", "=9")
    wrong = [bare, "--model", "resnet18", "--format", "csv", *out]
    assert "does not fit resnet18: the model has no" in refused(capsys, *wrong)
    wrong[2] = "resnet81"
    assert "timm knows no model 'resnet81'" in refused(capsys, *wrong)
    assert "--values int8 changes compact alone" in refused(
        capsys, undisturbed, "--format", "csv", "--values", "int8", *out
    )
    assert "--remove-dead changes onnx, torch and native alone" in refused(
        capsys, undisturbed, "--format", "safetensors", "--remove-dead", *out
    )
    (tmp_path / "empty/mine").touch()
    assert "exists: choose another folder" in refused(
        capsys, undisturbed, "--format", "csv", "--out", tmp_path / "empty"
    )
    monkeypatch.setattr(launcher.export.asked, "ONNX", ("onnx", "onnx_that_is_not_installed"))
    assert "needs onnx_that_is_not_installed: pip install 'scl-train[onnx]'" in refused(
        capsys, undisturbed, "--format", "onnx", *out
    )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp*"))


def test_a_model_that_is_not_what_its_run_says(
    undisturbed: Path, tmp_path: Path, capsys: Output
) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    state = load_file(run / "model.safetensors")
    state["classifier.weight"] += 1
    save_file(state, run / "model.safetensors")
    line = refused(capsys, run, "--format", "csv", "--out", tmp_path / "out")
    assert "classifier.weight has 640 weights, and layers.csv says" in line


def test_a_format_that_fails_leaves_none(
    undisturbed: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime computes something else than the model: another weight, in the second format."""
    honest = sclcore.export.graphs.onnx_session

    def broken(path: Path, threads: int = 0) -> Any:
        written = onnx.load(path)
        bias = next(t for t in written.graph.initializer if list(t.dims) == [10])
        value = numpy_helper.to_array(bias).copy()
        value[3] += 0.01
        bias.CopyFrom(numpy_helper.from_array(value, bias.name))
        onnx.save(written, path)
        return honest(path, threads)

    monkeypatch.setattr(sclcore.export.graphs, "onnx_session", broken)
    line = refused(
        capsys, undisturbed, "--format", "safetensors,onnx", "--out", tmp_path / "out", code=1
    )
    assert "model.onnx gives other outputs than the model: they differ by 0.01" in line
    assert list(tmp_path.iterdir()) == []


@contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_a_kill_leaves_nothing_that_could_be_mistaken(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = launch(scl("export", undisturbed, "--format", "safetensors,onnx", "--out", out))
    with killed(process):
        # Stopped the moment the first format is there, so that the kill strikes in between.
        wait_until(lambda: list(tmp_path.glob(".tmp-out-*/model.safetensors")), what="safetensors")
        os.kill(process.pid, signal.SIGSTOP)
        assert process.poll() is None and not out.exists()
    assert not out.exists()
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".tmp-out-")
    # The next one clears it away.
    export(undisturbed, out, "safetensors,csv")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
