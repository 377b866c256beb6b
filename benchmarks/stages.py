"""What a rank holds in memory by ZeRO stage: SCL on a vision transformer, stage 3 ÷ stage 2.

    python -m benchmarks.stages [--device cpu|cuda] [--ranks N] [--model M] [--depth D] [--quick]

The ranks, started from here, train through the launcher's DeepSpeed engine on small images, so that
activations are nothing beside the weights. Quoted, of the rank that has most, and beyond what its
process had before the model was made: the memory between two updates, and the peak of three updates
after those in which state is allocated. On CUDA what PyTorch's allocator handed out, on the CPU
resident memory. Beside it stands what the launcher foretells of the peak (`scl train --dry-run`).
The last line is a JSON object; its ratio is that of the peaks.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks.common import options_parser, parse, report, table
from benchmarks.training import (
    LR,
    METHODS,
    WARM_UP,
    Load,
    PeakMemory,
    add_precision,
    add_threads,
    engine_and_step,
    engine_config,
    on_ranks,
    zero_stages,
)
from launcher.recipe.engine import EngineConfig
from launcher.recipe.method import OptimConfig
from launcher.start.needs import State, state_of

RANKS, IMAGE, BATCH = 4, 32, 2
# By count: of 4 bytes a weight that each rank holds of the network in stage 2, and of what travels,
# a part is left.
TARGET = 0.75


def measure_all(
    device: torch.device, config: EngineConfig, load: Load, stages: list[int]
) -> list[dict[str, int]]:
    """One result for each stage. Collective."""
    results = []
    for stage in stages:
        # An engine and its hooks refer to each other: until they are collected, they hold memory.
        gc.collect()
        staged = config.model_copy(update={"zero_stage": stage})
        results.append({"stage": stage, **measure(device, staged, load)})
    return results


def measure(device: torch.device, config: EngineConfig, load: Load) -> dict[str, int]:
    """Bytes of one rank: between updates, and at the peak of some."""
    memory = PeakMemory(device)
    engine, step = engine_and_step("scl", load, device, config)
    for _ in range(WARM_UP):
        step()
    gc.collect()
    memory.begin_again()
    between = memory.read()
    for _ in range(WARM_UP):
        step()
    del engine
    return {"between": between, "peak": memory.read()}


def foretold(load: Load) -> State:
    with torch.device("meta"):
        model = load.network()
        image = torch.empty(1, 3, load.image_size, load.image_size)
    optim = OptimConfig(global_batch_size=1, epochs=1, lr=LR)
    return state_of(METHODS["scl"], optim, model, image)


def main() -> None:
    parser = options_parser(__doc__)
    add_precision(parser)
    parser.add_argument("--ranks", type=int, default=RANKS, help="(default: %(default)s)")
    parser.add_argument("--model", default="vit_large_patch16_224", help="(default: %(default)s)")
    parser.add_argument("--depth", type=int, default=2, help="its blocks (default: %(default)s)")
    add_threads(parser, ranks=RANKS)
    options = parse(parser)
    ranks, depth = (2, 1) if options.quick else (options.ranks, options.depth)
    if options.device == "cuda" and torch.cuda.device_count() < ranks:
        parser.error(f"needs {ranks} GPUs; this machine has {torch.cuda.device_count()}")
    model = "vit_base_patch16_224" if options.quick else options.model
    load = Load(model, BATCH, IMAGE, {"img_size": IMAGE, "depth": depth})
    expected = foretold(load)
    found = on_ranks(measure_all, ranks, engine_config(options), load, zero_stages())
    results: list[dict[str, Any]] = []
    for of_ranks in zip(*found, strict=True):
        most = {key: max(each[key] for each in of_ranks) for key in of_ranks[0]}
        results.append(most | {"foretold": expected.per_rank(most["stage"], ranks)})
    print(f"{model}, {depth} blocks, {expected.weights / 4e6:.1f} M weights, {ranks} ranks")
    header = ["stage", "between updates", "peak", "foretold"]
    columns = ("between", "peak", "foretold")
    rows = [[f"{r['stage']}", *(f"{r[key] / 1e6:.0f} MB" for key in columns)] for r in results]
    print(table(header, rows))
    peaks = {result["stage"]: result["peak"] for result in results}
    report(
        "stages",
        ratio=peaks[3] / peaks[2],
        target=TARGET,
        device=torch.device(options.device),
        details={"model": model, "depth": depth, "ranks": ranks, "stages": results},
    )


if __name__ == "__main__":
    main()
