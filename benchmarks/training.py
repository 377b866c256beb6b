"""Training steps to be measured: timm models in the launcher's engine, processes, peak memory."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from data.stream.plan import BatchPlan
from launcher.cluster.world import World, free_port
from launcher.recipe.engine import EngineConfig
from launcher.recipe.method import OptimConfig
from launcher.run.engine import build_engine, process_group
from launcher.run.optimizer import build_optimizer
from sclcore.methods.dense import Dense
from sclcore.methods.scl import SCLMethod

METHODS = {"scl": SCLMethod(lam=0.1, mask_lr=1e-3), "dense": Dense()}
CLASSES = 1000
# A rate at which noise as data never ends in a NaN, which SCL would skip.
LR = 1e-3
WARM_UP = 3
_M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True)
class Load:
    """What a step trains: `batch` images of `image_size`² per rank through timm's `model`."""

    model: str
    batch: int
    image_size: int
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Of the model."""

    def network(self) -> nn.Module:
        return timm.create_model(self.model, num_classes=CLASSES, **self.arguments)

    def samples(self, device: torch.device) -> tuple[Tensor, Tensor]:
        images = torch.randn(self.batch, 3, self.image_size, self.image_size, device=device)
        return images, torch.randint(0, CLASSES, (self.batch,), device=device)


def zero_stages() -> list[int]:
    """The ZeRO stages of the launcher's engine."""
    return [*get_args(EngineConfig.model_fields["zero_stage"].annotation)]


def add_precision(parser: argparse.ArgumentParser) -> None:
    field = EngineConfig.model_fields["precision"]
    parser.add_argument(
        "--precision",
        choices=get_args(field.annotation),
        default=field.default,
        help="as in a recipe's engine (default: %(default)s)",
    )


def add_threads(parser: argparse.ArgumentParser, *, ranks: int = 1) -> None:
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, (os.cpu_count() or 1) // ranks),
        help="CPU threads of a rank (default: %(default)s)",
    )


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The engine of `--threads` and, where it is among the options, `--precision`."""
    settings = {"precision": options.precision} if "precision" in options else {}
    return EngineConfig(threads=options.threads, **settings)


def single_world() -> World:
    return World(0, 0, 1, "127.0.0.1", free_port(), source="benchmark")


def engine_step(
    method: str, load: Load, device: torch.device, config: EngineConfig
) -> Callable[[], None]:
    """One training step of `method` through the launcher's engine: forward, backward, update."""
    return engine_and_step(method, load, device, config)[1]


def engine_and_step(
    method: str, load: Load, device: torch.device, config: EngineConfig
) -> tuple[Any, Callable[[], None]]:
    """The same, with the engine that it trains."""
    torch.manual_seed(0)
    world_size = int(os.environ["WORLD_SIZE"])
    optim = OptimConfig(global_batch_size=load.batch * world_size, epochs=1, lr=LR)
    plan = BatchPlan(
        [optim.global_batch_size],
        seed=0,
        global_batch_size=optim.global_batch_size,
        world_size=world_size,
        rank=int(os.environ["RANK"]),
    )
    model = load.network().to(device)
    example = torch.empty(1, 3, load.image_size, load.image_size)
    optimizer = build_optimizer(METHODS[method], optim, model, example)
    engine = _build(model, optimizer, plan, config)
    engine.train()
    images, labels = load.samples(device)
    images = images.to(next(model.parameters()).dtype)

    def step() -> None:
        engine.backward(cross_entropy(engine(images).float(), labels))
        engine.step()

    return engine, step


def _build(model: nn.Module, optimizer: Optimizer, plan: BatchPlan, config: EngineConfig) -> Any:
    # It imports DeepSpeed, which chooses its accelerator then: not before process_group has.
    from launcher.run.optimizer_state import OptimizerState, parameter_names

    names = parameter_names(model, optimizer)
    engine = build_engine(model, optimizer, plan, clip_grad_norm=None, config=config)
    # Tells SCL what its flat tensors consist of, as launcher/run/build.py does.
    OptimizerState(engine, model, optimizer, names)
    return engine


def warm_up(steps: dict[str, Callable[[], None]]) -> None:
    """The first steps allocate state and choose algorithms."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()


def on_ranks(
    function: Callable[..., Any],
    ranks: int,
    config: EngineConfig,
    *arguments: Any,
    device: str | None = None,
) -> list[Any]:
    """What `function(device, config, *arguments)` returns on each of `ranks` new processes.

    `function` must be importable and return something JSON can hold. They form a process group of
    the launcher's, on `device` (default: that of the options); one that fails ends the others and
    is raised here.
    """
    port = free_port()
    environment = {"DS_ACCELERATOR": device} if device else {}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined]
            _run_rank,
            args=(ranks, port, folder, environment, config, function, arguments),
            nprocs=ranks,
        )
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def _run_rank(
    rank: int,
    ranks: int,
    port: int,
    folder: str,
    environment: dict[str, str],
    config: EngineConfig,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    world = World(rank, rank, ranks, "127.0.0.1", port, source="benchmark")
    world.export()
    with process_group(world, config) as device:
        result = function(device, config, *arguments)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))


class PeakMemory:
    """Bytes in use at the peak since this was made, beyond those in use then.

    On CUDA those of PyTorch's allocator. On the CPU those resident in this process, by
    /proc/self: `ru_maxrss` of a new process starts at the peak of the process that started it.
    What is freed goes back to the system from here on, or the peak would depend on the gaps that
    the C library keeps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._base = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)
            self._base = _resident("VmRSS")
        self.begin_again()

    def begin_again(self) -> None:
        """Forget the peak so far, but not what was in use at first."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._base
        return _resident("VmHWM") - self._base


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
