"""One benchmark: the forms of a model, timed at some batch sizes."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from launcher.bench.asked import Asked
from launcher.bench.form import Form
from launcher.bench.forms import forms
from launcher.bench.memory import measured, measured_here
from launcher.bench.timing import latencies
from launcher.errors import RunError, UsageError
from launcher.export.source import Source
from sclcore import layer_budgets, weight_uses
from sclcore.network.connections import find_connections

Say = Callable[[str], object]


def bench(source: Source, asked: Asked, say: Say = lambda _: None) -> dict[str, Any]:
    """Time every form of the model of `source`; what was measured, for JSON.

    Raises UsageError where there is no such device, RunError where a form does not run at a batch
    size.
    """
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no GPU here")
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if asked.memory and device.type != "cpu":
        raise UsageError("--memory is of engines on the CPU: add --device cpu")
    counts = asked.threads or (_cores(),)
    threads_before = torch.get_num_threads()
    memory: list[dict[str, Any]] = []
    try:
        say("preparing")
        with tempfile.TemporaryDirectory() as folder:
            all_forms = forms(source, device, Path(folder))
            rows = [
                row
                for threads in counts
                for row in _latencies(source, asked, all_forms, threads, device, say)
            ]
            if asked.memory:
                memory = _memory(source, asked, all_forms, counts, Path(folder), say)
    except RuntimeError as error:
        raise RunError(f"{source.file} does not run here: {error}") from error
    finally:
        torch.set_num_threads(threads_before)
    return {
        "bench": str(source.file),
        "network": source.network.as_dict(),
        "density": _density(source),
        "macs": _macs(source),
        "machine": _machine(device),
        "threads": list(counts),
        "rounds": asked.rounds,
        "milliseconds": rows,
        "memory": memory,
        "bytes": {form.name: form.bytes for form in all_forms if form.bytes is not None},
        "not_run": {form.name: form.why_not for form in all_forms if form.open is None},
    }


def _latencies(
    source: Source,
    asked: Asked,
    all_forms: Sequence[Form],
    threads: int,
    device: torch.device,
    say: Say,
) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(threads)
    runs = {form.name: form.open(threads) for form in all_forms if form.open is not None}
    for batch in asked.batches:
        say(f"batch {batch}, {threads} thread{'s' * (threads > 1)}")
        images = _images(source, batch)
        if device.type == "cuda":
            images = images.to(device, torch.float16)
        calls = {name: partial(run, images) for name, run in runs.items()}
        with torch.inference_mode():
            timed = latencies(calls, asked.rounds, device)
        for name, latency in timed.items():
            yield {"form": name, "batch": batch, "threads": threads, **asdict(latency)}


def _memory(
    source: Source,
    asked: Asked,
    all_forms: Sequence[Form],
    counts: Sequence[int],
    folder: Path,
    say: Say,
) -> list[dict[str, Any]]:
    """Of each form at each batch size and count of threads, in a process of its own."""
    rows = []
    for batch in asked.batches:
        images = folder / f"images-{batch}.npy"
        np.save(images, _images(source, batch).numpy())
        for form in all_forms:
            if form.open is None:
                continue
            for threads in counts:
                say(f"memory of {form.name}, batch {batch}")
                try:
                    if form.file is None:
                        found = measured_here(form.open(1), images, threads)
                    else:
                        found = measured(form.engine, form.file, images, threads)
                except OSError as error:
                    raise RunError(f"--memory: {error}") from error
                rows.append(
                    {"form": form.name, "batch": batch, "threads": threads, **asdict(found)}
                )
    return rows


def _images(source: Source, batch: int) -> torch.Tensor:
    # Not zeros: kernels may treat those in their own way.
    shape = source.network.example(batch).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _cores() -> int:
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _density(source: Source) -> float:
    tensors = [c.parameter for c in find_connections(source.model)]
    live = sum(int(torch.count_nonzero(p)) for p in tensors)
    return live / max(1, sum(p.numel() for p in tensors))


def _macs(source: Source) -> dict[str, int]:
    """Of one sample: what dense kernels compute, and what the live connections would need."""
    masks = {c.name: c.parameter != 0 for c in find_connections(source.model)}
    uses = weight_uses(source.model, source.network.example(1))
    budgets = layer_budgets(source.model, uses, masks)
    return {"dense": sum(b.macs_dense for b in budgets), "live": sum(b.macs for b in budgets)}


def _machine(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line
            for line in cpuinfo.read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        name = names[0].partition(":")[2].strip() if names else name
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"
