"""A network as a folder that a C compiler makes a library of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sclcore.export.files import ExportError
from sclcore.export.graphs import Compared, compare_outputs
from sclcore.export.native import sclrun
from sclcore.export.native.build import compile_sources, write_sources
from sclcore.export.native.file import save_network
from sclcore.export.native.lower import lower
from sclcore.export.native.steps import Network

MODEL = "model.scln"
Run = Callable[..., Tensor]


def save_native(
    model: nn.Module, folder: Path, example: Tensor, metadata: Mapping[str, Any] | None = None
) -> Compared:
    """Write `model`, its runtime and both libraries into `folder`; run it and compare.

    `example` is [2 or more, …] with the batch free. Raises ExportError: for a network with an
    operator without a kernel or weights that are not finite, where there is no C compiler, and
    where the outputs differ from the model's.
    """
    run, network = _written(model, folder, example, metadata or {})
    difference, scale = compare_outputs(model, run, example, MODEL)
    return Compared(difference, scale, live_of(network))


def open_native(model: nn.Module, folder: Path, example: Tensor) -> Run:
    """`model` in the runtime, as a function of float32 images and, if given, threads; `folder` is
    not needed afterwards.

    Raises ExportError as `save_native` does, but compares no outputs.
    """
    return _written(model, folder, example, {})[0]


def _written(
    model: nn.Module, folder: Path, example: Tensor, metadata: Mapping[str, Any]
) -> tuple[Run, Network]:
    network = lower(model, example)
    save_network(network, folder / MODEL, metadata)
    write_sources(folder)
    compile_sources(folder)
    try:
        runtime = sclrun.load(folder)
    except (ValueError, OSError) as error:
        raise ExportError(f"--format native: {error}") from error
    shape = network.out_shape

    def run(images: Tensor, threads: int = 1) -> Tensor:
        return torch.from_numpy(runtime(images.numpy(), threads)).reshape(len(images), *shape)

    return run, network


def live_of(network: Network) -> int:
    return sum(int(np.count_nonzero(s.weight)) for s in network.steps if s.weight is not None)
