"""What a machine reads of the set, and what classes a rank's batch has, by the number of machines.

    python -m benchmarks.reading [--quick]

A synthetic ImageNet, 1,280,000 samples of equal size; nothing is read but sample numbers, by the
plan that training uses. Bytes a node reads in an epoch, ÷ (set ÷ nodes): in stretches of shards, as
from a file system that all nodes share; as whole shards, as from an object store, in 256 of them
and in 2,048; the same in the second epoch, where a disk keeps half as much again as the node's
share (least recently used goes). Each node has 8 ranks of 32 samples. A node fetches a shard once
for two windows that follow one another. Classes in a rank's batch: of shards that were shuffled
when they were packed, and of shards that are sorted by class, beside the former order and chance.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from benchmarks.common import options_parser, parse, report, table
from data.stream.plan import MIXED, SPREAD, WINDOW, BatchPlan

SAMPLES, CLASSES = 1_280_000, 1000
RANKS, RANK_BATCH = 8, 32
NODES = (1, 2, 3, 4, 6, 7, 8, 10, 12, 14, 16, 24, 32, 64, 128)
TARGET = 1.25
CACHE = 1.5


def main() -> None:
    options = parse(options_parser(__doc__))
    numbers = (1, 4, 14) if options.quick else NODES
    rows = [_node_row(nodes, watched=2 if options.quick else 4) for nodes in numbers]
    header = ["nodes", "stretches", "most of a node", "256 shards", "2,048 shards", "2nd epoch"]
    print(table(header, [[_short(row[key]) for key in _KEYS] for row in rows]))
    mix = [_mix_row(nodes) for nodes in ((1, 4) if options.quick else (1, 4, 14, 64))]
    chance = CLASSES * (1 - (1 - 1 / CLASSES) ** RANK_BATCH)
    print(f"\ndifferent classes in a rank's {RANK_BATCH} samples; by chance {chance:.2f}")
    print(table(list(mix[0]), [[_short(value) for value in row.values()] for row in mix]))
    report(
        "reading",
        ratio=max(row["most"] for row in rows if row["nodes"] <= 14),
        target=TARGET,
        device=torch.device("cpu"),
        details={"rows": rows, "classes": mix},
    )


_KEYS = ("nodes", "stretches", "most", "shards_256", "shards_2048", "again_256")


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _node_row(nodes: int, watched: int) -> dict[str, Any]:
    """Of some of the nodes, the first and the last among them: bytes ÷ (set ÷ nodes)."""
    some = sorted({round(k * (nodes - 1) / max(1, watched - 1)) for k in range(watched)})
    found = [_node(nodes, node) for node in some]
    row: dict[str, Any] = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
    return {"nodes": nodes, "most": max(f["stretches"] for f in found), **row}


def _node(nodes: int, node: int) -> dict[str, float]:
    found = {}
    for shards in (256, 2048):
        size = SAMPLES // shards
        plan = BatchPlan([size] * shards, 0, nodes * RANKS * RANK_BATCH, nodes, node)
        windows = [plan.window_ids(w) for w in range(2 * plan.windows_per_epoch)]
        first = windows[: plan.windows_per_epoch]
        read = [np.unique(ids // size).tolist() for ids in windows]
        share = SAMPLES / nodes
        stretches = sum(_stretches(ids, size) for ids in first)
        found["stretches"] = max(found.get("stretches", 0), stretches / share)
        once, both = (size * _fetched(r, shards / nodes) for r in (read[: len(first)], read))
        found[f"shards_{shards}"] = once / share
        found[f"again_{shards}"] = (both - once) / share
    return found


def _stretches(ids: np.ndarray, size: int) -> int:
    """Samples from the first to the last that is read of each shard."""
    return sum(int(np.ptp(ids[ids // size == shard])) + 1 for shard in np.unique(ids // size))


def _fetched(windows: list[list[int]], share: float) -> int:
    """Shards fetched; a window's and the next one's stay whatever the cache may hold."""
    kept: OrderedDict[int, None] = OrderedDict()
    fetched = 0
    for number, wanted in enumerate(windows):
        following = windows[number + 1] if number + 1 < len(windows) else []
        for shard in wanted:
            fetched += shard not in kept
            kept[shard] = None
            kept.move_to_end(shard)
        in_use = {*wanted, *following}
        for shard in [s for s in kept if s not in in_use]:
            if len(kept) > CACHE * share:
                del kept[shard]
    return fetched


def _mix_row(nodes: int) -> dict[str, float]:
    labels = {"sorted": np.arange(SAMPLES) * CLASSES // SAMPLES}
    labels["packed"] = np.random.default_rng(0).permutation(labels["sorted"])
    row: dict[str, float] = {"nodes": nodes}
    for kind, order in (("former", MIXED), ("ours", SPREAD)):
        world = nodes * RANKS
        batches = [
            batch
            for rank in {0, world // 3, world - 1}
            for batch in _some_batches(world, rank, order)
        ]
        for name, of in labels.items():
            row[f"{name}, {kind}"] = float(np.mean([len(np.unique(of[b])) for b in batches]))
    return row


def _some_batches(world: int, rank: int, order: int) -> list[np.ndarray]:
    plan = BatchPlan([SAMPLES // 256] * 256, 0, world * RANK_BATCH, world, rank, order=order)
    steps = max(1, 4 * WINDOW // plan.global_batch_size)
    return [batch for batch, _ in zip(plan.micro_batches(0), range(steps), strict=False)]


if __name__ == "__main__":
    main()
