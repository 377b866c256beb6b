"""The model as a graph that runs without its Python code: ONNX, and PyTorch's own .pt2."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sclcore.export.files import ExportError, staged

OPSET = 20
TOLERANCE = 1e-4
"""Of the largest output. Both sides compute in float32, with sums in another order, which was seen
to make 5e-8 to 2e-6 of it. A norm with another epsilon or a missing layer makes far more."""
_INPUT, _OUTPUT, _BATCH = "images", "logits", "batch"


@dataclass(frozen=True)
class Compared:
    """How a written graph compares with its model, over batches of two sizes."""

    difference: float
    """Largest, over all outputs."""
    scale: float
    """Largest output."""
    live: int
    """Non-zero weights of the file, in all tensors with two and more dimensions that are not 1.

    Of an ONNX file those that are the model's: it also holds constants that were computed from
    weights and buffers, such as the position biases of windows."""


def trace(model: nn.Module, example: Tensor) -> ExportedProgram:
    """The graph of `model` in evaluation, for any batch size; `example` is [2 or more, …].

    Raises ExportError where PyTorch cannot follow the model.
    """
    dynamic = ({0: Dim(_BATCH, min=1)},)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(model.eval(), (example,), dynamic_shapes=dynamic)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ExportError(f"torch.export cannot follow {type(model).__name__}: {reason}") from error


def save_program(model: nn.Module, path: Path, example: Tensor) -> Compared:
    """Write `model` as .pt2, for `torch.export.load(path).module()`; reload and compare.

    `example` is [batch, …] with the batch free. Raises ExportError and then leaves nothing behind.
    """
    program = trace(model, example)
    with staged(path) as temporary:
        # Its loader wants the ending.
        inner = temporary.with_suffix(".pt2")
        try:
            with _quiet():
                torch.export.save(program, inner)
                loaded = torch.export.load(inner)
            inner.replace(temporary)
        finally:
            inner.unlink(missing_ok=True)
        difference, scale = compare_outputs(model, loaded.module(), example, path.name)
        live = sum(
            int(torch.count_nonzero(value))
            for value in loaded.state_dict.values()
            if value.is_floating_point() and _is_matrix(value.shape)
        )
        if live != (expected := _live_of_model(model)):
            raise ExportError(f"{path.name} holds {live:,} weights, the model {expected:,}")
        return Compared(difference, scale, live)


def save_onnx(model: nn.Module, path: Path, example: Tensor, opset: int = OPSET) -> Compared:
    """Write `model` as ONNX with input `images` [batch, …] and output `logits`; run it elsewhere.

    onnx's checker reads the file and onnxruntime's outputs are compared with the model's. Raises
    ExportError, also where onnx, onnxscript or onnxruntime is not installed, and then leaves
    nothing behind.
    """
    _need("onnx", "onnxscript", "onnxruntime")
    import onnx

    program = trace(model, example)
    try:
        with _quiet(), contextlib.redirect_stdout(None):
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[_INPUT],
                output_names=[_OUTPUT],
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ExportError(
            f"torch.onnx cannot write {type(model).__name__} with opset {opset}: {reason}"
        ) from error
    assert exported is not None
    with staged(path) as temporary:
        exported.save(temporary, external_data=False)
        onnx.save(_with_named_batch(onnx.load(str(temporary))), str(temporary))
        onnx.checker.check_model(str(temporary), full_check=True)
        written = onnx.load(str(temporary))
        versions = {entry.domain: entry.version for entry in written.opset_import}
        if versions.get("") != opset:
            raise ExportError(f"{path.name} has opset {versions.get('')} instead of {opset}")
        difference, scale = compare_outputs(model, onnx_session(temporary, 1), example, path.name)
        return Compared(difference, scale, live_of_onnx(written, model, path.name))


def onnx_session(path: Path, threads: int = 0) -> Callable[[Tensor], Tensor]:
    """An onnxruntime session on the CPU as a function of tensors; 0 threads: one per core."""
    _need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its spinning threads would slow whatever is timed beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return run


def same_outputs(one: nn.Module, other: nn.Module, example: Tensor, what: str) -> float:
    """The largest difference of the outputs of two models; ExportError beyond the tolerance."""
    return compare_outputs(one, other, example, what)[0]


def _with_named_batch(written: Any) -> Any:
    """The ONNX model with its free axis named `batch`, not by a number of PyTorch's own."""
    graph = written.graph
    first = graph.input[0].type.tensor_type.shape.dim[0]
    given = re.compile(rf"\b{re.escape(first.dim_param)}\b")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = given.sub(_BATCH, axis.dim_param)
    return written


def compare_outputs(
    model: nn.Module, other: Callable[[Tensor], Tensor], example: Tensor, what: str
) -> tuple[float, float]:
    """(largest difference, largest output) over a batch like `example` and one of another size.

    Noise of unit variance, as normalised images have.
    """
    reference = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    difference = scale = 0.0
    for batch in (len(example), len(example) + 3):
        images = torch.randn(batch, *example.shape[1:], generator=generator)
        with torch.no_grad():
            expected, found = reference(images), other(images)
        if expected.shape != found.shape:
            shapes = f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
            raise ExportError(f"{what} gives outputs of the shape {shapes}")
        difference = max(difference, (expected - found).abs().max().item())
        scale = max(scale, expected.abs().max().item())
    # Written so that a NaN, which compares with nothing, is an error as well.
    if not difference <= TOLERANCE * scale:
        raise ExportError(
            f"{what} gives other outputs than the model: they differ by {difference:.2g}, and the "
            f"largest is {scale:.2g}"
        )
    return difference, scale


def _live_of_model(model: nn.Module) -> int:
    return sum(int(torch.count_nonzero(value)) for _, value in _matrices(model))


def live_of_onnx(written: Any, model: nn.Module, what: str) -> int:
    """The non-zero weights of `model` in the ONNX model `written`.

    A weight is known by its name (batch norm may be folded into it, and its factor can be 0), or,
    where it was transposed and renamed, by its values; one that only constants are multiplied with
    has become part of those. Raises ExportError where one has fewer zeros in the file `what`.
    """
    from onnx import TensorProto, numpy_helper

    weights = {name: value.cpu().numpy() for name, value in _matrices(model)}
    # Of weights with the same values, all zeros say, a file may hold one.
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, weight in weights.items():
        for digest in {_digest(weight), _digest(weight.T)}:
            alike[digest].append(name)
    known: dict[str, int] = {}
    for tensor in written.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or not _is_matrix(tensor.dims):
            continue
        array = numpy_helper.to_array(tensor)
        live = int(np.count_nonzero(array))
        names = {*alike.get(_digest(array), []), *({tensor.name} & weights.keys())}
        for name in names:
            if live > (most := np.count_nonzero(weights[name])):
                raise ExportError(
                    f"{what} holds {live:,} live weights of {name}, the model {most:,}"
                )
            known[name] = live
    return sum(known.values())


def _digest(array: Any) -> tuple[tuple[int, ...], bytes]:
    return array.shape, hashlib.blake2b(np.ascontiguousarray(array)).digest()


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floats of a state that are no vectors, in whatever shape those are to be broadcast."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and _is_matrix(value.shape):
            yield name, value


def _is_matrix(shape: Sequence[int]) -> bool:
    return sum(size > 1 for size in shape) > 1


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}: pip install 'scl-train[onnx]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings about their own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
