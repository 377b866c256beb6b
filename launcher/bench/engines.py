"""The model in engines that are not PyTorch: our own runtime, onnxruntime, OpenVINO."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from launcher.bench.form import Form, Run
from launcher.bench.sessions import ENGINES
from sclcore.export import ExportError, save_onnx
from sclcore.export.native import MODEL, open_native

_ON_CPU = "measured on the CPU: --device cpu"
_ONNX = "needs pip install 'scl-train[onnx]'"


def engines(
    model: nn.Module, smaller: nn.Module | None, example: Tensor, folder: Path
) -> list[Form]:
    """Every engine with the model in it, on the CPU; `smaller` is it without dead features.

    Their files are written into `folder`, which must stay until all is measured.
    """
    given = _onnx_file(model, folder / "model.onnx", example)
    removed = None
    if smaller is not None:
        removed = _onnx_file(smaller, folder / "smaller.onnx", example)
    return [
        _in_onnx("onnxruntime", given),
        _in_onnx("onnxruntime, removed", removed),
        _in_openvino(given),
        _native(model, example, folder),
    ]


def elsewhere() -> list[Form]:
    """The same where the device is no CPU: none of them is run."""
    names = ("onnxruntime", "onnxruntime, removed", "openvino", "native")
    return [Form(name, None, _ON_CPU) for name in names]


def session(engine: str, file: Path, threads: int) -> Run:
    """A file in an engine of sessions.py, as a function of tensors."""
    run = ENGINES[engine](file, threads)()
    return lambda images: torch.from_numpy(run(images.numpy()))


def _onnx_file(model: nn.Module, path: Path, example: Tensor) -> Path | str:
    """The file, or why there is none."""
    if importlib.util.find_spec("onnxruntime") is None:
        return _ONNX
    try:
        save_onnx(model, path, example)
    except ExportError as error:
        return str(error)
    return path


def _in_onnx(name: str, file: Path | str | None, engine: str = "onnxruntime") -> Form:
    if file is None:
        return Form(name, None, "they cannot be removed")
    if isinstance(file, str):
        return Form(name, None, file)
    return _of_file(name, engine, file)


def _of_file(name: str, engine: str, file: Path) -> Form:
    def opened(threads: int) -> Run:
        return session(engine, file, threads)

    return Form(name, opened, engine=engine, file=file, bytes=file.stat().st_size)


def _in_openvino(file: Path | str) -> Form:
    # No dependency: it is measured where somebody has it.
    if importlib.util.find_spec("openvino") is None:
        return Form("openvino", None, "not installed: pip install openvino")
    return _in_onnx("openvino", file, "openvino")


def _native(model: nn.Module, example: Tensor, folder: Path) -> Form:
    try:
        run = open_native(model, folder, example)
    except ExportError as error:
        return Form("native", None, str(error))
    file = folder / MODEL

    def opened(threads: int) -> Run:
        return lambda images: run(images, threads)

    return Form("native", opened, engine="native", file=file, bytes=file.stat().st_size)
