"""How well the order of samples is mixed, against webdataset's buffer and a uniform shuffle.

    python -m benchmarks.shuffle [--quick]

A synthetic ImageNet: 1,000 classes, 256 shards; nothing is read but sample numbers. Two kinds of
shards: shuffled when they were packed (ours), and sorted by class (found elsewhere). Each order is
judged by how far neighbours in the output were apart in the input, and by the number of different
classes in a batch of 256 and of 1,024, as a share of what a uniform shuffle has. webdataset is run
itself: shuffled shard list, then `.shuffle(1000)` and `.shuffle(5000)`, one worker.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.common import options_parser, parse, report, table
from data.stream import plan

BYTES_PER_IMAGE = 110_000
WINDOWS = (16_384, 32_768, 65_536)
BATCHES = (256, 1024)
TARGET = 0.99


def main() -> None:
    options = parse(options_parser(__doc__))
    shards, per_shard = (64, 1250) if options.quick else (256, 5004)
    sizes = [per_shard] * shards
    total = sum(sizes)
    classes = 1000
    rng = np.random.default_rng(0)
    by_class = np.arange(total) * classes // total
    kinds = {"shuffled": rng.permutation(by_class), "sorted": by_class}
    orders: dict[str, Callable[[], np.ndarray]] = {
        "uniform": lambda: rng.permutation(total),
        **{f"window {w:,}": _ours(sizes, w) for w in WINDOWS},
        "webdataset shuffle(1000)": lambda: _webdataset(sizes, 1000),
        "webdataset shuffle(5000)": lambda: _webdataset(sizes, 5000),
    }
    results: dict[str, dict[str, Any]] = {}
    for name, order in orders.items():
        results[name] = _measure(order(), kinds, per_shard)
    for window in WINDOWS:
        results[f"window {window:,}"]["gb_in_flight"] = round(
            (min(window, total) + 2 * per_shard) * BYTES_PER_IMAGE / 1e9, 2
        )
    print(_table(results))
    start = _starting(sizes)
    print(f"\nstarting in epoch 7: {start['ms']:.1f} ms, {start['peak_mb']:.2f} MB")
    chosen, uniform = results[f"window {plan.WINDOW:,}"], results["uniform"]
    report(
        "shuffle",
        ratio=chosen["shuffled"]["classes_256"] / uniform["shuffled"]["classes_256"],
        target=TARGET,
        device=torch.device("cpu"),
        details={"samples": total, "shards": shards, "orders": results, "start": start},
    )


def _ours(sizes: list[int], window: int) -> Callable[[], np.ndarray]:
    def order() -> np.ndarray:
        former, plan.WINDOW = plan.WINDOW, window
        try:
            return plan.epoch_order(sizes, 0, 1)
        finally:
            plan.WINDOW = former

    return order


def _webdataset(sizes: list[int], buffer: int) -> np.ndarray:
    import random

    from webdataset.filters import shuffle

    ends = np.cumsum(sizes)
    shards = list(range(len(sizes)))
    random.Random(0).shuffle(shards)

    def samples() -> Iterator[int]:
        for shard in shards:
            yield from range(int(ends[shard]) - sizes[shard], int(ends[shard]))

    mixed = shuffle(buffer, rng=random.Random(0))
    return np.fromiter(mixed(samples()), np.int64, sum(sizes))


def _measure(order: np.ndarray, kinds: dict[str, np.ndarray], per_shard: int) -> dict[str, Any]:
    assert np.array_equal(np.sort(order), np.arange(len(order)))
    apart = np.abs(np.diff(order))
    found: dict[str, Any] = {
        "median_apart": int(np.median(apart)),
        "closer_than_5": round(float((apart < 5).mean()), 6),
        "closer_than_a_shard": round(float((apart < per_shard).mean()), 6),
    }
    for kind, labels in kinds.items():
        ordered = labels[order]
        found[kind] = {f"classes_{b}": round(_classes(ordered, b), 2) for b in BATCHES}
    return found


def _classes(labels: np.ndarray, batch: int) -> float:
    """Different classes per batch, the mean over the epoch's whole batches."""
    whole = np.sort(labels[: len(labels) // batch * batch].reshape(-1, batch), axis=1)
    return float(1 + (np.diff(whole, axis=1) > 0).sum(axis=1).mean())


def _starting(sizes: list[int]) -> dict[str, float]:
    """Milliseconds and MB from nothing to the first batch's ids, near the end of an epoch."""
    tracemalloc.start()
    began = time.perf_counter()
    batches = plan.BatchPlan(sizes, 0, 1024)
    next(batches.micro_batches(7, batches.steps_per_epoch - 1))
    took = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"ms": round(1e3 * took, 1), "peak_mb": round(peak / 1e6, 2)}


def _table(results: dict[str, dict[str, Any]]) -> str:
    header = ["order", "GB in flight", "median apart", "apart < 5", "apart < a shard"]
    header += [f"{kind}: classes/{b}" for kind in ("shuffled", "sorted") for b in BATCHES]
    rows = []
    for name, found in results.items():
        classes = [found[kind][f"classes_{b}"] for kind in ("shuffled", "sorted") for b in BATCHES]
        rows.append(
            [
                name,
                str(found.get("gb_in_flight", "")),
                f"{found['median_apart']:,}",
                f"{100 * found['closer_than_5']:.3f} %",
                f"{100 * found['closer_than_a_shard']:.2f} %",
                *(f"{value:.1f}" for value in classes),
            ]
        )
    return table(header, rows)


if __name__ == "__main__":
    main()
