"""The model in engines that are not PyTorch: our own runtime, onnxruntime, OpenVINO."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher.bench.form import Form, Run
from sclcore.export import ExportError, save_onnx
from sclcore.export.graphs import onnx_session
from sclcore.export.native import open_native

_ON_CPU = "measured on the CPU: --device cpu"
_ONNX = "needs pip install 'scl-train[onnx]'"


def engines(
    model: nn.Module, smaller: nn.Module | None, example: Tensor, threads: int
) -> list[Form]:
    """Every engine with the model in it, on the CPU; `smaller` is it without dead features."""
    with tempfile.TemporaryDirectory() as folder:
        given = _onnx_file(model, Path(folder) / "model.onnx", example)
        removed = None
        if smaller is not None:
            removed = _onnx_file(smaller, Path(folder) / "smaller.onnx", example)
        return [
            _in_onnx("onnxruntime", given, lambda path: onnx_session(path, threads)),
            _in_onnx("onnxruntime, removed", removed, lambda path: onnx_session(path, threads)),
            _in_openvino(given, threads),
            _native(model, example, threads),
        ]


def elsewhere() -> list[Form]:
    """The same where the device is no CPU: none of them is run."""
    names = ("onnxruntime", "onnxruntime, removed", "openvino", "native")
    return [Form(name, None, _ON_CPU) for name in names]


def _onnx_file(model: nn.Module, path: Path, example: Tensor) -> Path | str:
    """The file, or why there is none."""
    if importlib.util.find_spec("onnxruntime") is None:
        return _ONNX
    try:
        save_onnx(model, path, example)
    except ExportError as error:
        return str(error)
    return path


def _in_onnx(name: str, file: Path | str | None, opened: Callable[[Path], Run]) -> Form:
    if file is None:
        return Form(name, None, "they cannot be removed")
    if isinstance(file, str):
        return Form(name, None, file)
    return Form(name, opened(file), bytes=file.stat().st_size)


def _in_openvino(file: Path | str, threads: int) -> Form:
    # No dependency: it is measured where somebody has it.
    if importlib.util.find_spec("openvino") is None:
        return Form("openvino", None, "not installed: pip install openvino")
    return _in_onnx("openvino", file, lambda path: openvino_session(path, threads))


def openvino_session(path: Path, threads: int) -> Run:
    """An OpenVINO session on the CPU, in float32, as a function of tensors."""
    openvino: Any = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    # Its default may be bfloat16, in which outputs differ.
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy())[0].copy())

    return run


def _native(model: nn.Module, example: Tensor, threads: int) -> Form:
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = open_native(model, Path(folder), example, threads)
        except ExportError as error:
            return Form("native", None, str(error))
        return Form("native", run, bytes=(Path(folder) / "model.scln").stat().st_size)
