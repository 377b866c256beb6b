"""One benchmark: the forms of a model, timed at some batch sizes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from launcher.bench.asked import Asked
from launcher.bench.forms import forms
from launcher.bench.timing import latencies
from launcher.errors import RunError, UsageError
from launcher.export.source import Source
from sclcore import layer_budgets, weight_uses
from sclcore.network.connections import find_connections


def bench(
    source: Source, asked: Asked, say: Callable[[str], object] = lambda _: None
) -> dict[str, Any]:
    """Time every form of the model of `source`; what was measured, for JSON.

    Raises UsageError where there is no such device, RunError where a form does not run at a batch
    size.
    """
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no GPU here")
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    threads = asked.threads or _cores()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        say("preparing")
        all_forms = forms(source, threads, device)
        rows = []
        for batch in asked.batches:
            say(f"batch {batch}")
            example = source.network.example(batch)
            # Not zeros: kernels may treat those in their own way.
            images = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
            if device.type == "cuda":
                images = images.to(device, torch.float16)
            calls = {f.name: _call(f.run, images) for f in all_forms if f.run is not None}
            with torch.inference_mode():
                timed = latencies(calls, asked.rounds, device)
            rows += [{"form": n, "batch": batch, **asdict(t)} for n, t in timed.items()]
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
        "threads": threads,
        "rounds": asked.rounds,
        "milliseconds": rows,
        "bytes": {form.name: form.bytes for form in all_forms if form.bytes is not None},
        "not_run": {form.name: form.why_not for form in all_forms if form.run is None},
    }


def _call(run: Callable, images: torch.Tensor) -> Callable[[], object]:
    return lambda: run(images)


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
