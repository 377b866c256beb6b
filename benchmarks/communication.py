"""What SCL sends beside dense training: bytes per training step, SCL ÷ dense, counted exactly.

    python -m benchmarks.communication [--device cpu|cuda] [--stage 0|1|2|3|all] [--quick]

Two ranks, started from here, train through the launcher's DeepSpeed engine. Every collective is
counted where PyTorch hands it to its process group, below DeepSpeed, DDP and torch.distributed
alike, with the size of its whole message: what an all-reduce reduces, an all-gather has gathered, a
reduce-scatter starts from. In stage 0, where all of them go through DeepSpeed, the count must
agree to the byte with that of DeepSpeed's own logger, else the benchmark fails.

Batch and image size have no influence on the bytes and are small. The last line is a JSON object;
its ratio is that of the worst stage of the first model.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import options_parser, parse, report, table
from benchmarks.training import (
    METHODS,
    Load,
    add_precision,
    add_threads,
    engine_config,
    engine_step,
    on_ranks,
    warm_up,
    zero_stages,
)
from launcher.recipe.engine import EngineConfig

MODELS = ("resnet50", "mobilenetv2_100")
RANKS, STEPS, TARGET = 2, 2, 1.005


class CollectiveBytes(TorchDispatchMode):
    """While active, counts the calls and the bytes of each kind of collective of this process.

    Process groups are called through PyTorch's dispatcher, from Python as from C++ (DDP) and from
    the threads of a backward pass; this sees them there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2].strip("_")
        if func.namespace == "c10d" and "barrier" not in name:
            self.calls[name] += 1
            # Outputs and inputs come first; where they differ, the larger is the whole message.
            self.bytes[name] += max(_size(argument) for argument in args[:2])
        return func(*args, **(kwargs or {}))


def _size(value: Any) -> int:
    return sum(t.nbytes for t in tree_leaves(value) if isinstance(t, Tensor))


def counted(step: Callable[[], None]) -> CollectiveBytes:
    with CollectiveBytes() as seen:
        for _ in range(STEPS):
            step()
    return seen


def check_against_deepspeed(step: Callable[[], None]) -> None:
    """RuntimeError unless DeepSpeed's logger counts the same bytes of the same steps."""
    import deepspeed.comm as deepspeed_comm
    from deepspeed.comm.comm import comms_logger

    comms_logger.reset_data()
    deepspeed_comm.configure(enabled=True, prof_all=True, prof_ops=[], verbose=False, debug=False)
    ours = counted(step)
    deepspeed_comm.configure(enabled=False)
    theirs = sum(
        size * times[0]
        for sizes in comms_logger.comms_dict.values()
        for size, times in sizes.items()
    )
    if ours.bytes.total() != theirs:
        raise RuntimeError(
            f"counted {dict(ours.bytes)} bytes in {STEPS} steps, DeepSpeed's logger {theirs}"
        )


def count(
    device: torch.device, config: EngineConfig, load: Load, method: str, check: bool
) -> dict[str, Any]:
    """Of one rank: bytes and collectives per step, and the bytes of each kind of collective."""
    step = engine_step(method, load, device, config)
    warm_up({method: step})
    if check:
        check_against_deepspeed(step)
    seen = counted(step)
    return {
        "bytes": seen.bytes.total() // STEPS,
        "collectives": seen.calls.total() // STEPS,
        "kinds": {kind: size // STEPS for kind, size in sorted(seen.bytes.items())},
    }


def count_all(
    device: torch.device, config: EngineConfig, loads: list[Load], stages: list[int]
) -> list[dict[str, Any]]:
    """One result for each model and stage. Collective."""
    results = []
    for load in loads:
        for stage in stages:
            staged = config.model_copy(update={"zero_stage": stage})
            found = {}
            for method in METHODS:
                found[method] = count(device, staged, load, method, check=stage == 0)
                gc.collect()
            ratio = found["scl"]["bytes"] / found["dense"]["bytes"]
            results.append({"model": load.model, "stage": stage, **found, "ratio": ratio})
    return results


def row(result: dict[str, Any]) -> list[str]:
    scl, dense = result["scl"], result["dense"]
    return [
        f"{result['model']}, stage {result['stage']}",
        f"{dense['bytes']:,} B",
        f"{scl['bytes']:,} B",
        f"{scl['bytes'] - dense['bytes']:,} B",
        f"{result['ratio']:.6f}",
        f"{dense['collectives']}",
        f"{scl['collectives']}",
    ]


def main() -> None:
    known = zero_stages()
    parser = options_parser(__doc__)
    add_precision(parser)
    add_threads(parser, ranks=RANKS)
    parser.add_argument(
        "--stage",
        choices=[*map(str, known), "all"],
        default="all",
        help="ZeRO stage of the launcher's engine (default: %(default)s)",
    )
    options = parse(parser, devices=RANKS)
    stages = known if options.stage == "all" else [int(options.stage)]
    models = MODELS[1:] if options.quick else MODELS
    loads = [Load(model, batch=2, image_size=64) for model in models]
    results = on_ranks(count_all, RANKS, engine_config(options), loads, stages)[0]
    print(f"bytes per training step of a rank, {RANKS} ranks, {options.precision}")
    header = ["", "dense", "SCL", "more", "ratio", "collectives", "SCL's"]
    print(table(header, [row(result) for result in results]))
    report(
        "communication",
        ratio=max(r["ratio"] for r in results if r["model"] == models[0]),
        target=TARGET,
        device=torch.device(options.device),
        details={"ranks": RANKS, "precision": options.precision, "counts": results},
    )


if __name__ == "__main__":
    main()
