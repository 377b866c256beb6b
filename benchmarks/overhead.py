"""What SCL costs beside dense training: step time and peak memory, SCL ÷ dense.

    python -m benchmarks.overhead [--device cpu|cuda] [--precision P] [--quick]

A step is forward, backward and update of one rank, both times through the launcher's DeepSpeed
engine: same model, same batch of noise, SGD with momentum against SCL. Steps of the two are timed
in turn; quoted are medians and the median of the ratios. Peak memory is that of three steps with
everything they need, model included, each method in a process of its own: what PyTorch's allocator
handed out on CUDA, growth of the resident memory on the CPU. The last line is a JSON object; its
ratio is the step time's of the first model at the largest batch.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks.common import in_turn, median, median_ratio, options_parser, parse, report, table
from benchmarks.training import (
    METHODS,
    WARM_UP,
    Load,
    PeakMemory,
    add_precision,
    add_threads,
    engine_config,
    engine_step,
    on_ranks,
    single_world,
    warm_up,
)
from launcher.recipe.engine import EngineConfig
from launcher.run.engine import process_group

MODELS = ("resnet50", "mobilenetv2_100", "vit_small_patch16_224")
BATCHES = {"cpu": (8, 32), "cuda": (64, 128, 256)}
ROUNDS = {"cpu": 10, "cuda": 50}
TARGETS = {"cpu": 1.05, "cuda": 1.02}


def loads(device: str, quick: bool) -> list[Load]:
    if quick:
        return [Load("mobilenetv2_100", batch=4, image_size=64)]
    return [Load(model, batch, 224) for model in MODELS for batch in BATCHES[device]]


def peak_memory(device: torch.device, config: EngineConfig, method: str, load: Load) -> int:
    """Bytes at the peak of a few steps; for a process of its own."""
    peak = PeakMemory(device)
    step = engine_step(method, load, device, config)
    for _ in range(WARM_UP):
        step()
    return peak.read()


def step_times(
    load: Load, device: torch.device, config: EngineConfig, rounds: int
) -> dict[str, float]:
    steps = {method: engine_step(method, load, device, config) for method in METHODS}
    warm_up(steps)
    timed = in_turn(steps, device, rounds)
    del steps
    # An engine and its hooks refer to each other: until they are collected, they hold memory.
    gc.collect()
    return {
        "scl_ms": 1e3 * median(timed, "scl"),
        "dense_ms": 1e3 * median(timed, "dense"),
        "time_ratio": median_ratio(timed, "scl", "dense"),
    }


def row(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['model']}, batch {result['batch']}",
        f"{result['dense_ms']:.1f} ms",
        f"{result['scl_ms']:.1f} ms",
        f"{result['time_ratio']:.3f}",
        f"{result['dense_mb']:.0f} MB",
        f"{result['scl_mb']:.0f} MB",
        f"{result['memory_ratio']:.3f}",
    ]


def main() -> None:
    parser = options_parser(__doc__)
    add_precision(parser)
    add_threads(parser)
    parser.add_argument("--rounds", type=int, help="steps of each (default: cpu 10, cuda 50)")
    options = parse(parser)
    config = engine_config(options)
    rounds = options.rounds or (3 if options.quick else ROUNDS[options.device])
    chosen = loads(options.device, options.quick)
    memory = {
        (load, method): on_ranks(peak_memory, 1, config, method, load)[0] / 1e6
        for load in chosen
        for method in METHODS
    }
    world = single_world()
    world.export()
    results: list[dict[str, Any]] = []
    with process_group(world, config) as device:
        for load in chosen:
            scl, dense = memory[load, "scl"], memory[load, "dense"]
            results.append(
                {
                    "model": load.model,
                    "batch": load.batch,
                    "image_size": load.image_size,
                    **step_times(load, device, config, rounds),
                    "scl_mb": scl,
                    "dense_mb": dense,
                    "memory_ratio": scl / dense,
                }
            )
    print(f"training step, one rank, {options.precision}, {rounds} rounds")
    header = ["", "dense", "SCL", "ratio", "dense peak", "SCL peak", "ratio"]
    print(table(header, [row(result) for result in results]))
    headline = [r for r in results if r["model"] == chosen[0].model][-1]
    report(
        "overhead",
        ratio=headline["time_ratio"],
        target=TARGETS[options.device],
        device=device,
        details={"precision": options.precision, "rounds": rounds, "steps": results},
    )


if __name__ == "__main__":
    main()
