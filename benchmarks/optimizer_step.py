"""The optimizer's step alone: SCL against torch's fused SGD, and against the bytes it must move.

    python benchmarks/optimizer_step.py [--device cpu|cuda] [--model resnet50] [--quick]

The two steps are timed in turn, so that a machine whose speed drifts treats both alike; quoted are
medians and the median of the ratios. The floor is the time to move each byte once at the measured
bandwidth of a copy: per weight, SGD reads G, w and its momentum and writes two of them; SCL reads
G, w, m and two momenta and writes w, m, both momenta and v. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch.optim import SGD, Optimizer

from sclcore import SCL, connection_groups

SGD_BYTES, SCL_BYTES = 5 * 4, 10 * 4
TARGET = 0.7


def with_gradients(name: str, device: torch.device) -> torch.nn.Module:
    model = timm.create_model(name).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 256 MiB; the best of several."""
    source = torch.randn(64 * 2**20, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(8))
    return 2 * source.numel() * 4 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="resnet50", help="any timm model (default: resnet50)")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = with_gradients(options.model, device)
    weights = sum(p.numel() for p in model.parameters())
    steps: dict[str, Optimizer] = {
        "sgd": SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True),
        "scl": SCL(connection_groups(model), lr=1e-4, lam=0.1, weight_decay=1e-4),
        "frozen": SCL(connection_groups(model, mask_lr=0.0), lr=1e-4, lam=0.1, weight_decay=1e-4),
    }
    for optimizer in steps.values():
        for _ in range(3):
            optimizer.step()
    rounds = [
        {name: seconds(optimizer.step, device) for name, optimizer in steps.items()}
        for _ in range(5 if options.quick else 25)
    ]
    median = {name: statistics.median(r[name] for r in rounds) for name in steps}
    ratio = {n: statistics.median(r[n] / r["sgd"] for r in rounds) for n in ("scl", "frozen")}
    speed = bandwidth(device)
    floor = {"sgd": weights * SGD_BYTES / speed, "scl": weights * SCL_BYTES / speed}
    print(f"{options.model}, {weights / 1e6:.1f} M parameters, copy at {speed / 1e9:.1f} GB/s")
    for name, label in (("sgd", "fused SGD"), ("scl", "SCL"), ("frozen", "SCL, masks frozen")):
        print(f"  {label:<18} {1e3 * median[name]:8.2f} ms  ×{ratio.get(name, 1.0):.2f}")
    for name in floor:
        share = floor[name] / median[name]
        print(f"  byte floor of {name}  {1e3 * floor[name]:8.2f} ms  reached to {share:.0%}")
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU"
    print(
        json.dumps(
            {
                "benchmark": "optimizer_step",
                "ratio": round(floor["scl"] / median["scl"], 3),
                "target": TARGET,
                "machine": f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}",
                "details": {
                    "scl_over_sgd": round(ratio["scl"], 3),
                    "frozen_over_sgd": round(ratio["frozen"], 3),
                    "milliseconds": {name: round(1e3 * t, 3) for name, t in median.items()},
                    "copy_gb_per_s": round(speed / 1e9, 1),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
