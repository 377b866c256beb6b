"""From which density on a layer is faster sparse, and what one live weight costs by the map's size.

    python -m benchmarks.runtime_layers [--quick]

Layers of ResNet-50 at 224 × 224 and a Linear one, each alone: the native runtime at densities from
1 to 0.02 against the dense layer in onnxruntime, batch 1, one thread, in turn, by processor time.
`even` is the density at which both take equally long, between the two densities around it. The
last column is what a live weight costs, from the difference of two densities, in nanoseconds, and
below is the line through those: a + b · vectors of 16 pixels. `method.cost: latency` has its two
numbers from here.

The last line is a JSON object; its ratio is the least of `even`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import options_parser, parse, report, table
from launcher.bench.timing import latencies
from sclcore.export import save_onnx
from sclcore.export.graphs import onnx_session
from sclcore.export.native import sclrun
from sclcore.export.native.build import compile_sources, write_sources
from sclcore.export.native.file import save_network
from sclcore.export.native.lower import lower

DENSITIES = (1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)
TARGET = 0.2
DEVICE = torch.device("cpu")
# (input channels, output channels, kernel, stride, pixels of the input's side; 1: Linear)
LAYERS = (
    (3, 64, 7, 2, 224),
    (64, 64, 3, 1, 56),
    (64, 256, 1, 1, 56),
    (128, 128, 3, 2, 56),
    (128, 128, 3, 1, 28),
    (512, 128, 1, 1, 28),
    (256, 256, 3, 1, 14),
    (1024, 256, 1, 1, 14),
    (512, 512, 3, 1, 7),
    (2048, 512, 1, 1, 7),
    (2048, 1000, 1, 1, 1),
)


def layer_of(inputs: int, outputs: int, kernel: int, stride: int, size: int) -> nn.Module:
    torch.manual_seed(0)
    if size == 1:
        return nn.Linear(inputs, outputs).eval()
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.ReLU()).eval()


def measure(layer: nn.Module, images: Tensor, folder: Path, rounds: int) -> dict[str, Any]:
    """`ratio`: native ÷ dense at each density; `nanoseconds` of a live weight."""
    example = images.expand(2, *images.shape[1:])
    save_onnx(layer, folder / "dense.onnx", example)
    dense = onnx_session(folder / "dense.onnx", 1)
    network = lower(layer, example)
    [step] = network.steps
    assert step.weight is not None
    full, generator = step.weight, np.random.default_rng(0)
    calls: dict[Any, Any] = {"dense": lambda: dense(images)}
    live = {}
    given = images.numpy()
    for density in DENSITIES:
        mask = generator.random(full.shape) < density
        step.weight = np.where(mask, full, 0).astype(np.float32)
        live[density] = int(mask.sum())
        save_network(network, folder / f"{density}.scln", {})
        model = sclrun.load(folder / f"{density}.scln")
        calls[density] = lambda model=model: model(given)
    timed = latencies(calls, rounds, DEVICE, time.process_time)
    ratios = {density: timed[density].ratio for density in DENSITIES}
    between = 1e6 * (timed[0.1].median - timed[0.02].median)
    return {
        "dense": timed["dense"].median,
        "ratios": ratios,
        "even": even(ratios),
        "nanoseconds": between / (live[0.1] - live[0.02]),
        "vectors": vectors(step.weight.shape, network.tensors[network.out]),
    }


def even(ratios: dict[float, float]) -> float:
    """The largest density below which all are faster than dense, between the two around it."""
    above = None
    for density, ratio in ratios.items():
        if all(r <= 1 for d, r in ratios.items() if d <= density):
            if above is None:
                return density
            return density + (above - density) * (1 - ratio) / (ratios[above] - ratio)
        above = density
    return 0.0


def vectors(weight: tuple[int, ...], out: tuple[int, ...]) -> int:
    return -(-out[1] * out[2] // 16) if len(weight) == 4 else 1


def main() -> None:
    options = parse(options_parser(__doc__))
    torch.set_num_threads(1)
    rounds = 2 if options.quick else 9
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sources(folder)
        compile_sources(folder)
        for shape in LAYERS[-3::2] if options.quick else LAYERS:
            inputs, outputs, kernel, stride, size = shape
            images = torch.randn(1, inputs, size, size)
            what = f"{kernel}×{kernel}/{stride} {inputs}→{outputs}, {size}×{size}"
            if size == 1:
                images, what = images.flatten(1), f"Linear {inputs}→{outputs}"
            results[what] = measure(layer_of(*shape), images, folder, rounds)
    maps = [r for what, r in results.items() if not what.startswith("Linear")]
    # Relative errors count: a weight of a small map costs little, and there are many.
    each = np.array([r["nanoseconds"] for r in maps])
    basis = np.array([[1.0, r["vectors"]] for r in maps]) / each[:, None]
    (a, b), *_ = np.linalg.lstsq(basis, np.ones(len(maps)), rcond=None)
    print(
        table(
            ["native ÷ dense at density", *(f"{d:g}" for d in DENSITIES), "even", "ns"],
            [
                [
                    what,
                    *(f"{r['ratios'][d]:.2f}" for d in DENSITIES),
                    f"{r['even']:.2f}",
                    f"{r['nanoseconds']:.2f}",
                ]
                for what, r in results.items()
            ],
        )
    )
    print(f"a live weight of a convolution: {a:.2f} + {b:.3f} · vectors ns")
    report(
        "runtime_layers",
        ratio=min(r["even"] for r in results.values()),
        target=TARGET,
        device=DEVICE,
        details={"layers": results, "a": a, "b": b},
    )


if __name__ == "__main__":
    main()
