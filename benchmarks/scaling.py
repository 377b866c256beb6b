"""How a training step scales: measured on the ranks at hand, modelled up to 1,024 GPUs.

    python -m benchmarks.scaling [--device cpu|cuda] [--model resnet50] [--batch N] [--quick]

Weak scaling: the batch of a rank stays, so the ideal is a step that takes as long on N ranks as on
one, and efficiency is the time on one ÷ the time on N. Measured on 1 and 2 processes (cpu) or on
1, 2, 4 … GPUs of this machine (cuda), steps of SCL and of dense training in turn, the slowest rank
of each; quoted are medians. Up to 1,024 GPUs a model, drawn as such, whose assumptions are printed:

    step = time on one GPU + all-reduce of the gradient + SCL's own small messages
    ring of N:  2 (N − 1) / N · S / bandwidth + 2 (N − 1) · latency
    tree of N:  2 S / bandwidth + 2 log₂ N · latency

for an all-reduce of S bytes, whichever is faster, as NCCL chooses: inside the nodes, then with
S / (GPUs per node) bytes between them. The time on one GPU is measured where there is one; on the
CPU it is `--step-ms`, and SCL's in the proportion measured. Each method is compared with itself on
one rank: `benchmarks.overhead` compares the two. Writes a figure. The last line is a JSON object;
its ratio is SCL's efficiency ÷ that of dense training at 1,024 GPUs, by the model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from benchmarks.common import in_turn, machine, median, options_parser, parse, report, table
from benchmarks.training import (
    METHODS,
    Load,
    add_precision,
    add_threads,
    engine_config,
    engine_step,
    on_ranks,
    warm_up,
)
from launcher.recipe.engine import EngineConfig
from sclcore.network.connections import find_connections

MODELLED = [2**power for power in range(11)]
TARGET = 0.99
ASSUMED_STEP_MS = 88.3
BATCH = {"cpu": 8, "cuda": 256}
ROUNDS = {"cpu": 8, "cuda": 50}
COLORS = {"dense": "#555555", "scl": "#1f6fb4"}
LABELS = {"dense": "dense", "scl": "SCL"}


@dataclass(frozen=True)
class Network:
    """Bandwidths in bytes per second and GPU, each way; latency in seconds per message."""

    gpus_per_node: int
    intra: float
    inter: float
    latency: float

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds for `size` bytes on each of `gpus`, which fill nodes one after the other."""
        local = min(gpus, self.gpus_per_node)
        nodes = -(-gpus // self.gpus_per_node)
        # Reduce-scatter and all-gather inside the nodes enclose the all-reduces between them, of
        # which there is one for each GPU of a node.
        return self._level(size, local, self.intra) + self._level(size / local, nodes, self.inter)

    def _level(self, size: float, ranks: int, bandwidth: float) -> float:
        ring = 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * self.latency
        hops = 2 * math.ceil(math.log2(ranks))
        tree = 2 * size / bandwidth + hops * self.latency
        return min(ring, tree) if ranks > 1 else 0.0


def message_bytes(layers: int, ranks: int) -> int:
    """SCL's message before a step: three numbers a layer, one for each feature that ranks cut.

    The most it can be; `benchmarks.communication` counts what it is.
    """
    return 4 * (1 + 3 * layers + ranks - 1)


def count_bytes(layers: int) -> int:
    """SCL's message after a step: the live connections of each layer."""
    return 8 * layers


@dataclass(frozen=True)
class Model:
    """Seconds of a training step by the number of GPUs."""

    network: Network
    compute: dict[str, float]
    """Seconds on one rank by method."""
    parameters: int
    layers: int

    def step(self, method: str, gpus: int) -> float:
        seconds = self.compute[method] + self.network.all_reduce(4 * self.parameters, gpus)
        if method == "scl":
            seconds += self.network.all_reduce(message_bytes(self.layers, gpus), gpus)
            seconds += self.network.all_reduce(count_bytes(self.layers), gpus)
        return seconds

    def efficiency(self, method: str, gpus: int) -> float:
        return self.step(method, 1) / self.step(method, gpus)


def time_steps(
    device: torch.device, config: EngineConfig, load: Load, rounds: int
) -> list[dict[str, float]]:
    """Seconds of this rank's steps. Collective."""
    steps = {method: engine_step(method, load, device, config) for method in METHODS}
    warm_up(steps)
    return in_turn(steps, device, rounds, before=dist.barrier)


def measure(
    ranks: Sequence[int], config: EngineConfig, load: Load, rounds: int
) -> dict[int, dict[str, float]]:
    """Number of ranks → method → median seconds of the slowest rank."""
    found = {}
    for count in ranks:
        by_rank = on_ranks(time_steps, count, config, load, rounds)
        slowest = [
            {method: max(r[method] for r in same) for method in METHODS}
            for same in zip(*by_rank, strict=True)
        ]
        found[count] = {method: median(slowest, method) for method in METHODS}
    return found


def ranks_at_hand(device: str) -> list[int]:
    most = torch.cuda.device_count() if device == "cuda" else 2
    return [count for count in MODELLED if count <= most]


def computing(measured: dict[str, float], step_ms: float | None) -> tuple[dict[str, float], str]:
    """Seconds of a step on one GPU by method, and where they are from."""
    if step_ms is None:
        return measured, "as measured"
    ratio = measured["scl"] / measured["dense"]
    return (
        {"dense": 1e-3 * step_ms, "scl": 1e-3 * step_ms * ratio},
        f"given for dense training, not measured; SCL's by the ratio measured here, {ratio:.3f}",
    )


def assumptions(model: Model, source: str) -> list[str]:
    net, most = model.network, MODELLED[-1]
    return [
        f"a step on one GPU: dense {1e3 * model.compute['dense']:.1f} ms, "
        f"SCL {1e3 * model.compute['scl']:.1f} ms ({source})",
        f"gradient of {4 * model.parameters / 1e6:.1f} MB in float32, all-reduced after the "
        "backward pass, no overlap",
        f"SCL's own messages, {message_bytes(model.layers, most):,} and "
        f"{count_bytes(model.layers):,} bytes at {most:,} GPUs, are always sent, though only "
        "sharded state needs them",
        f"{net.gpus_per_node} GPUs per node, {net.intra / 1e9:g} GB/s inside, "
        f"{net.inter / 1e9:g} GB/s per GPU between nodes, latency {1e6 * net.latency:g} µs",
        "ring or tree, whichever is faster; no stragglers, no congestion, data always there",
    ]


def efficiencies(measured: dict[int, dict[str, float]], method: str) -> dict[int, float]:
    return {count: measured[1][method] / taken[method] for count, taken in measured.items()}


def draw(
    model: Model, measured: dict[int, dict[str, float]], title: str, unit: str, path: Path
) -> None:
    """Efficiency over GPUs: lines are the model, marks are measured."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lowest = 1.0
    # SCL lies on dense training where all is well: the broad line stays visible below it.
    styles: dict[str, dict[str, Any]] = {
        "dense": {"linewidth": 5, "alpha": 0.45, "solid_capstyle": "round"},
        "scl": {"linewidth": 1.8},
    }
    marks = {"dense": {"marker": "o", "markersize": 11}, "scl": {"marker": "D", "markersize": 6}}
    for method, style in styles.items():
        values = [model.efficiency(method, gpus) for gpus in MODELLED]
        found = efficiencies(measured, method)
        lowest = min(lowest, *values, *found.values())
        axes.plot(MODELLED, values, color=COLORS[method], **style)
        filled = {"color": COLORS[method], "linestyle": "", "zorder": 5, "clip_on": False}
        axes.plot(list(found), list(found.values()), **marks[method], **filled)
    axes.set_xscale("log", base=2)
    axes.set_xticks(MODELLED)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda gpus, _: f"{gpus:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(1, MODELLED[-1])
    bottom = max(0.0, int(10 * lowest - 0.5) / 10)
    axes.set_ylim(bottom, 1 + 0.04 * (1 - bottom))
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"{unit}, the same batch on each")
    axes.set_ylabel("time on one ÷ time on N")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11, loc="left")
    net = model.network
    axes.text(
        0.985,
        0.03,
        f"the model: {net.gpus_per_node} GPUs per node, {net.intra / 1e9:g} GB/s inside,\n"
        f"{net.inter / 1e9:g} GB/s per GPU between nodes, {1e6 * net.latency:g} µs per message,\n"
        f"{1e3 * model.compute['dense']:.1f} ms a step on one, no overlap of communication",
        transform=axes.transAxes,
        color=COLORS["dense"],
        fontsize=9,
        ha="right",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    handles = []
    for method in styles:
        color = COLORS[method]
        end = model.efficiency(method, MODELLED[-1])
        label = f"{LABELS[method]}, model: {end:.1%} at {MODELLED[-1]:,}"
        handles.append(Line2D([], [], color=color, label=label, **styles[method]))
        label = f"{LABELS[method]}, measured on {', '.join(map(str, measured))}"
        handles.append(Line2D([], [], color=color, linestyle="", label=label, **marks[method]))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def lines(
    model: Model, measured: dict[int, dict[str, float]]
) -> list[tuple[str, int, dict[str, float], dict[str, float]]]:
    """(kind, ranks, seconds by method, efficiency by method), the measured ones first."""
    shares = {method: efficiencies(measured, method) for method in METHODS}
    found = [
        ("measured", count, taken, {method: shares[method][count] for method in METHODS})
        for count, taken in measured.items()
    ]
    modelled = [
        (
            "modelled",
            gpus,
            {method: model.step(method, gpus) for method in METHODS},
            {method: model.efficiency(method, gpus) for method in METHODS},
        )
        for gpus in MODELLED
    ]
    return found + modelled


def read_options() -> argparse.Namespace:
    parser = options_parser(__doc__)
    add_precision(parser)
    add_threads(parser, ranks=2)
    parser.add_argument("--model", default="resnet50", help="any timm model (default: resnet50)")
    parser.add_argument("--batch", type=int, help="images per rank (default: cpu 8, cuda 256)")
    parser.add_argument("--rounds", type=int, help="steps of each (default: cpu 8, cuda 50)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--intra-gb-s",
        type=float,
        default=450.0,
        help="per GPU inside a node (default: %(default)s, NVLink of an H100)",
    )
    parser.add_argument(
        "--inter-gb-s",
        type=float,
        default=50.0,
        help="per GPU between nodes (default: %(default)s, InfiniBand at 400 Gb/s)",
    )
    parser.add_argument(
        "--latency-us", type=float, default=5.0, help="per message (default: %(default)s)"
    )
    parser.add_argument(
        "--step-ms",
        type=float,
        help="a dense step on one GPU, for the model (default: measured on cuda; on cpu "
        f"{ASSUMED_STEP_MS:g}, 256 images at 2,900 a second, between what is published for "
        "ResNet-50 in PyTorch on an H100 and an H200)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/scaling.png"), help="default: %(default)s"
    )
    return parse(parser)


def main() -> None:
    options = read_options()
    load = Load(options.model, options.batch or BATCH[options.device], 224)
    rounds = options.rounds or ROUNDS[options.device]
    if options.quick:
        load, rounds = Load("mobilenetv2_100", batch=4, image_size=64), 3
    device = torch.device(options.device)
    measured = measure(ranks_at_hand(options.device), engine_config(options), load, rounds)
    network = load.network()
    assumed = ASSUMED_STEP_MS if options.device == "cpu" else None
    compute, source = computing(measured[1], options.step_ms or assumed)
    model = Model(
        Network(
            options.gpus_per_node,
            1e9 * options.intra_gb_s,
            1e9 * options.inter_gb_s,
            1e-6 * options.latency_us,
        ),
        compute,
        parameters=sum(p.numel() for p in network.parameters()),
        layers=len(find_connections(network)),
    )
    told = assumptions(model, source)
    print("assumptions of the model:")
    print("\n".join(f"  {line}" for line in told))
    rows = [
        [
            f"{count:,} {kind}",
            *(f"{1e3 * taken[method]:.1f} ms" for method in ("dense", "scl")),
            *(f"{share[method]:.2%}" for method in ("dense", "scl")),
            f"{share['scl'] / share['dense']:.4f}",
        ]
        for kind, count, taken, share in lines(model, measured)
    ]
    print(table(["ranks", "dense", "SCL", "efficiency", "SCL's", "ratio"], rows))
    unit = "GPUs" if options.device == "cuda" else "ranks (CPU processes; the model: GPUs)"
    title = (
        f"Weak scaling of a training step: {load.model}, batch {load.batch} per rank, "
        f"{options.precision}\n{machine(device)}"
    )
    draw(model, measured, title, unit, options.out)
    print(f"wrote {options.out}")
    last = MODELLED[-1]
    report(
        "scaling",
        ratio=model.efficiency("scl", last) / model.efficiency("dense", last),
        target=TARGET,
        device=device,
        details={
            "load": {"model": load.model, "batch": load.batch, "image_size": load.image_size},
            "measured_seconds": measured,
            "modelled_efficiency": {
                gpus: {method: model.efficiency(method, gpus) for method in METHODS}
                for gpus in MODELLED
            },
            "modelled_scl_over_dense_step": model.step("scl", last) / model.step("dense", last),
            "assumptions": told,
        },
    )


if __name__ == "__main__":
    main()
