"""How much faster a sparse network runs in the native runtime than dense in the best dense engine.

    python -m benchmarks.runtime [--quick] [--networks NAME,…] [--runs DIR,…] [--train]

ResNet-50, MobileNetV2 and ViT-S at 224 × 224 with random masks, at 20, 10, 5 and 2 % of the
connections: either every layer has that density, or layers have those of an Erdős–Rényi kernel
(arXiv 1911.11134), in which small and early layers stay nearly dense. Depthwise layers keep all
weights. These at batch 1 on one thread; at 10 % by Erdős–Rényi also batches of 8 and 32, two
threads, and the peak of memory (launcher/bench/memory.py). So are the networks of runs: the demo's
and the glyphs'; `--train` trains those that are not here. Dense are PyTorch, onnxruntime, and
OpenVINO where it is installed; engines take turns in every round. One thread is timed by processor
time, so that what else the machine does counts little; two are by the clock, and need an idle
machine.

The last line is a JSON object; its ratio is the time of the best dense engine ÷ that of the native
runtime, for the first network with 10 % of its connections in every layer.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from benchmarks.common import options_parser, parse, report, table
from benchmarks.runtime_runs import RUNS, train_missing
from launcher.bench.engines import session
from launcher.bench.memory import measured, measured_here
from launcher.bench.timing import latencies
from launcher.export.source import open_source
from sclcore.driver.budgets import erk_densities
from sclcore.export import save_compact, save_onnx
from sclcore.export.native import MODEL, open_native
from sclcore.network.connections import find_connections

DENSITIES = (0.2, 0.1, 0.05, 0.02)
NETWORKS = ("resnet50", "mobilenetv2_100", "vit_small_patch16_224")
TARGETS = {0.1: 1.8, 0.05: 3.0, 0.02: 5.0}
DEVICE = torch.device("cpu")
Engines = dict[str, Path | nn.Module]
"""What each engine runs: a file, or under `torch` the module itself."""
"""Engine → the file that it loads; the native runtime's first."""
Row = dict[str, Any]


@torch.no_grad()
def masked(model: nn.Module, density: float, spread: str) -> tuple[nn.Module, int]:
    """(`model` with random weights at random places, how many)."""
    generator = torch.Generator().manual_seed(0)
    connections = [c for c in find_connections(model) if c.parameter.shape[1] > 1]
    shapes = [tuple(c.parameter.shape) for c in connections]
    shares = erk_densities(shapes, density) if spread == "erk" else [density] * len(shapes)
    live = 0
    for connection, share in zip(connections, shares, strict=True):
        weight = connection.parameter
        mask = torch.rand(weight.shape, generator=generator) < share
        std = (2 / max(1.0, share * weight[0].numel())) ** 0.5
        weight.copy_(torch.randn(weight.shape, generator=generator) * std * mask)
        live += int(mask.sum())
    return model.eval(), live


def dense_files(model: nn.Module, example: Tensor, folder: Path) -> Engines:
    folder.mkdir()
    save_onnx(model, folder / "dense.onnx", example)
    files: Engines = {"torch": model, "onnxruntime": folder / "dense.onnx"}
    if importlib.util.find_spec("openvino") is not None:
        files["openvino"] = folder / "dense.onnx"
    return files


def native_file(model: nn.Module, example: Tensor, folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    open_native(model, folder, example)
    return {"native": folder / MODEL}


def measure(files: Engines, images: Tensor, threads: int, rounds: int) -> Row:
    """Milliseconds of each engine, and under `ratio` best dense ÷ native."""
    torch.set_num_threads(threads)
    runs = {
        engine: model if isinstance(model, nn.Module) else session(engine, model, threads)
        for engine, model in files.items()
    }
    calls = {name: (lambda run=run: run(images)) for name, run in runs.items()}
    clock = time.process_time if threads == 1 else time.perf_counter
    with torch.inference_mode():
        timed = latencies(calls, rounds, DEVICE, clock)
    # Within a round: the ratio to the first, which is native.
    best = min(latency.ratio for name, latency in timed.items() if name != "native")
    milliseconds = {name: latency.median for name, latency in timed.items()}
    return {"threads": threads, "milliseconds": milliseconds, "ratio": best}


def at_densities(
    name: str, files: Engines, size: int, rounds: int, folder: Path, quick: bool
) -> list[Row]:
    """Batch 1, one thread; the first row is the one that the last line is about."""
    example = torch.zeros(2, 3, size, size)
    images = noise(1, example)
    rows: list[Row] = []
    for spread in ("uniform", "erk"):
        for density in DENSITIES[1:2] if quick else DENSITIES:
            model, live = masked(timm.create_model(name), density, spread)
            native = native_file(model, example, folder)
            save_compact({k: v + 0 for k, v in model.state_dict().items()}, folder / "model.sclc")
            sizes = {
                "bytes": native["native"].stat().st_size,
                "compact": (folder / "model.sclc").stat().st_size,
            }
            rows.append(
                {"network": name, "spread": spread, "density": density, "live": live, "batch": 1}
                | sizes
                | measure({**native, **files}, images, 1, rounds)
                | {"target": TARGETS.get(density)}
            )
            print(f"{name} {spread} {density:.0%}: {rows[-1]['ratio']:.2f}×", flush=True)
    return rows


def at_batches(
    about: Row, files: Engines, example: Tensor, batches: Sequence[int], rounds: int, folder: Path
) -> list[Row]:
    """Several images at a time, on one thread and two, and the memory that takes."""
    rows: list[Row] = []
    for batch in batches:
        images = noise(batch, example)
        np.save(folder / "images.npy", images.numpy())
        for threads in (1, 2):
            memory = {
                engine: asdict(
                    measured_here(model, folder / "images.npy", threads)
                    if isinstance(model, nn.Module)
                    else measured(engine, model, folder / "images.npy", threads)
                )
                for engine, model in files.items()
            }
            timed = measure(files, images, threads, rounds)
            rows.append({**about, "batch": batch, **timed, "memory": memory})
            rows[-1]["target"] = about["target"] if (batch, threads) == (32, 1) else None
            what = f"{about['network']}, batch {batch}, {threads} threads"
            print(f"{what}: {timed['ratio']:.2f}×", flush=True)
    return rows


def trained(run: Path, rounds: int, folder: Path, batches: Sequence[int]) -> list[Row]:
    source = open_source(run)
    model, example = source.model, source.network.example(2)
    live = sum(int(torch.count_nonzero(c.parameter)) for c in find_connections(model))
    size = sum(c.parameter.numel() for c in find_connections(model))
    folder.mkdir()
    native = native_file(model, example, folder)
    files = {**native, **dense_files(model, example, folder / "dense")}
    about = {"network": run.name, "spread": "trained", "density": live / size, "live": live}
    about["bytes"] = native["native"].stat().st_size
    return at_batches({**about, "target": 2.0}, files, example, batches, rounds, folder)


def noise(batch: int, example: Tensor) -> Tensor:
    return torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(0))


def random_networks(name: str, quick: bool, rounds: int, folder: Path) -> list[Row]:
    size = 64 if quick else 224
    example = torch.zeros(2, 3, size, size)
    folder.mkdir()
    dense, _ = masked(timm.create_model(name), 1.0, "uniform")
    files = dense_files(dense, example, folder / "dense")
    rows = at_densities(name, files, size, rounds, folder, quick)
    model, live = masked(timm.create_model(name), 0.1, "erk")
    native = native_file(model, example, folder)
    about = {"network": name, "spread": "erk", "density": 0.1, "live": live, "target": None}
    about["bytes"] = native["native"].stat().st_size
    files = {**native, **files}
    few = max(2, rounds // 3)
    return rows + at_batches(about, files, example, (1,) if quick else (1, 8, 32), few, folder)


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument(
        "--networks", default=",".join(NETWORKS), help="of timm, with commas between them"
    )
    parser.add_argument("--runs", default=",".join(map(str, RUNS)), help="folders of trained runs")
    parser.add_argument("--train", action="store_true", help="train the default runs not yet here")
    options = parse(parser)
    if options.train:
        train_missing()
    rounds = 2 if options.quick else 15
    names = ["resnet18"] if options.quick else options.networks.split(",")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, names):
            rows += random_networks(name, options.quick, rounds, Path(folder) / name)
        for run in map(Path, filter(None, options.runs.split(","))):
            if run.exists():
                batches = (1, 32) if options.quick else (1, 8, 32)
                rows += trained(run, 4 * rounds, Path(folder) / run.name, batches)
            else:
                print(f"no {run}: --train trains it")
    show(rows)
    first = rows[0]
    for row in rows:
        if row["spread"] == "uniform" and row["density"] == 0.1:
            first = row
            break
    report(
        "runtime",
        ratio=first["ratio"],
        target=TARGETS[0.1],
        device=DEVICE,
        details={"rows": rows, "rounds": rounds},
    )


def show(rows: Sequence[Row]) -> None:
    engines = list(rows[0]["milliseconds"])
    print(
        table(
            ["", "layers", "density", "batch", "threads", *engines, "ratio", "target"],
            [
                [
                    row["network"],
                    row["spread"],
                    f"{row['density']:.3g}",
                    str(row["batch"]),
                    str(row["threads"]),
                    *(f"{row['milliseconds'][name]:.3g}" for name in engines),
                    f"{row['ratio']:.2f}",
                    f"{row['target'] or ''}",
                ]
                for row in rows
            ],
        )
    )


if __name__ == "__main__":
    main()
