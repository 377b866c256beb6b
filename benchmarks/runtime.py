"""How much faster a sparse network runs in the native runtime than dense in the best dense engine.

    python -m benchmarks.runtime [--quick] [--networks NAME,…] [--run runs/digits_scl]

ResNet-50 and MobileNetV2 at 224 × 224 with random masks, at 20, 10, 5 and 2 % of the connections:
either every layer has that density, or layers have those of an Erdős–Rényi kernel (arXiv
1911.11134), in which small and early layers stay nearly dense. Depthwise layers keep all weights.
And the network of a run, the demo's. Batch 1, and 8 and 32 of the run's; one thread. Engines take
turns in every round and are timed by processor time, so that what else the machine does counts
little. Dense are PyTorch, onnxruntime, and OpenVINO where it is installed.

The last line is a JSON object; its ratio is the time of the best dense engine ÷ that of the native
runtime, for the first network with 10 % of its connections in every layer.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.common import options_parser, parse, report, table
from launcher.bench.engines import openvino_session
from launcher.bench.timing import latencies
from launcher.export.source import open_source
from sclcore.driver.budgets import erk_densities
from sclcore.export import save_compact, save_onnx
from sclcore.export.graphs import onnx_session
from sclcore.export.native import open_native
from sclcore.network.connections import find_connections

DENSITIES = (0.2, 0.1, 0.05, 0.02)
TARGETS = {0.1: 1.8, 0.05: 3.0, 0.02: 5.0}
DEVICE = torch.device("cpu")
Run = Callable[[Tensor], object]
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


def dense_engines(model: nn.Module, example: Tensor, folder: Path) -> dict[str, Run]:
    path = folder / "dense.onnx"
    save_onnx(model, path, example)
    engines: dict[str, Run] = {"torch": model, "onnxruntime": onnx_session(path, 1)}
    if importlib.util.find_spec("openvino") is not None:
        engines["openvino"] = openvino_session(path, 1)
    return engines


def measure(engines: dict[str, Run], images: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of each, and under `ratio` best dense ÷ native."""
    calls = {name: (lambda run=run: run(images)) for name, run in engines.items()}
    with torch.inference_mode():
        timed = latencies(calls, rounds, DEVICE, time.process_time)
    milliseconds = {name: latency.median for name, latency in timed.items()}
    # Within a round: the ratio to the first, which is native.
    best = min(latency.ratio for name, latency in timed.items() if name != "native")
    return {**milliseconds, "ratio": best}


def networks(name: str, size: int, rounds: int, folder: Path, quick: bool) -> list[Row]:
    example = torch.zeros(2, 3, size, size)
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    dense, _ = masked(timm.create_model(name), 1.0, "uniform")
    engines = dense_engines(dense, example, folder)
    rows: list[Row] = []
    for spread in ("uniform", "erk"):
        for density in DENSITIES[1:2] if quick else DENSITIES:
            model, live = masked(timm.create_model(name), density, spread)
            native = open_native(model, folder, example)
            size_of = (folder / "model.scln").stat().st_size
            save_compact({k: v + 0 for k, v in model.state_dict().items()}, folder / "model.sclc")
            sizes = {"bytes": size_of, "compact": (folder / "model.sclc").stat().st_size}
            timed = measure({"native": native, **engines}, images, rounds)
            rows.append({"network": name, "spread": spread, "density": density, "live": live,
                         "batch": 1, **sizes, "milliseconds": timed, "ratio": timed.pop("ratio"),
                         "target": TARGETS.get(density)})  # fmt: skip
            print(f"{name} {spread} {density:.0%}: {rows[-1]['ratio']:.2f}×", flush=True)
    return rows


def trained(run: Path, rounds: int, folder: Path) -> list[Row]:
    source = open_source(run)
    model, example = source.model, source.network.example(2)
    live = sum(int(torch.count_nonzero(c.parameter)) for c in find_connections(model))
    engines = {
        "native": open_native(model, folder, example),
        **dense_engines(model, example, folder),
    }
    rows = []
    for batch in (1, 8, 32):
        images = torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(0))
        timed = measure(engines, images, rounds)
        rows.append({"network": str(run), "spread": "trained", "density": None, "live": live,
                     "batch": batch, "bytes": (folder / "model.scln").stat().st_size,
                     "milliseconds": timed, "ratio": timed.pop("ratio"),
                     "target": 2.0 if batch == 32 else None})  # fmt: skip
    return rows


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument(
        "--networks", default="resnet50,mobilenetv2_100", help="of timm, with commas between them"
    )
    parser.add_argument("--run", type=Path, default=Path("runs/digits_scl"), help="a trained run")
    options = parse(parser)
    torch.set_num_threads(1)
    rounds, size = (2, 64) if options.quick else (15, 224)
    names = ["resnet18"] if options.quick else options.networks.split(",")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            rows += networks(name, size, rounds, Path(folder), options.quick)
        if options.run.exists():
            rows += trained(options.run, 4 * rounds, Path(folder))
        else:
            print(f"no {options.run}: make demo trains it; or name another with --run")
    engines = list(rows[0]["milliseconds"])
    print(
        table(
            ["", "layers", "density", "batch", *engines, "ratio", "target"],
            [
                [
                    row["network"],
                    row["spread"],
                    "" if row["density"] is None else f"{row['density']:.0%}",
                    str(row["batch"]),
                    *(f"{row['milliseconds'][name]:.3g}" for name in engines),
                    f"{row['ratio']:.2f}",
                    f"{row['target'] or ''}",
                ]
                for row in rows
            ],
        )
    )
    first = next(r for r in rows if r["spread"] == "uniform" and r["density"] == 0.1)
    report(
        "runtime",
        ratio=first["ratio"],
        target=TARGETS[0.1],
        device=DEVICE,
        details={"rows": rows, "rounds": rounds, "image_size": size},
    )


if __name__ == "__main__":
    main()
