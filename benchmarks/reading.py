"""What a machine reads of the set, and what classes a rank's batch has, by the number of machines.

    python -m benchmarks.reading [--quick]

A synthetic ImageNet, 1,280,000 samples of equal size; nothing is read but sample numbers, by the
plan that training uses. Bytes a node reads in an epoch, ÷ (set ÷ nodes): in stretches of shards, as
from a file system that all nodes share; from an object store 256 shards in the pieces that
`scl pack` cuts them into; as whole shards, 256 of them and 2,048; pieces and the 2,048 in the
second epoch as well, where a disk keeps half as much again as the node's share (least recently used
goes). Each node has 8 ranks of 32 samples. A node fetches a piece once for two windows that follow
one another. Classes in a rank's batch: of shards that were shuffled when they were packed, and of
shards that are sorted by class, beside the former order and chance.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from benchmarks.common import options_parser, parse, report, table
from data.shards.pieces import cuts
from data.stream.plan import MIXED, SPREAD, WINDOW, BatchPlan

SAMPLES, CLASSES = 1_280_000, 1000
RANKS, RANK_BATCH = 8, 32
BYTES = 110_000
NODES = (1, 2, 3, 4, 6, 7, 8, 10, 12, 14, 16, 24, 32, 64, 128)
TARGET = 1.25
CACHE = 1.5


def main() -> None:
    options = parse(options_parser(__doc__))
    numbers = (1, 4, 14) if options.quick else NODES
    rows = [_node_row(nodes, watched=2 if options.quick else 4) for nodes in numbers]
    header = ["nodes", "stretches", "most of a node", "in pieces", "most", "2nd epoch"]
    header += ["256 whole", "2,048 whole", "2nd epoch"]
    print(table(header, [[_short(row[key]) for key in _KEYS] for row in rows]))
    mix = [_mix_row(nodes) for nodes in ((1, 4) if options.quick else (1, 4, 14, 64))]
    chance = CLASSES * (1 - (1 - 1 / CLASSES) ** RANK_BATCH)
    print(f"\ndifferent classes in a rank's {RANK_BATCH} samples; by chance {chance:.2f}")
    print(table(list(mix[0]), [[_short(value) for value in row.values()] for row in mix]))
    report(
        "reading",
        ratio=max(row[key] for row in rows for key in _MOST if row["nodes"] <= 14),
        target=TARGET,
        device=torch.device("cpu"),
        details={"rows": rows, "classes": mix},
    )


_MOST = ("most_stretches", "most_pieces")
_KEYS = ("nodes", "stretches", "most_stretches", "pieces", "most_pieces", "pieces_again")
_KEYS += ("whole_256", "whole_2048", "whole_2048_again")


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _node_row(nodes: int, watched: int) -> dict[str, Any]:
    """Of some of the nodes, the first and the last among them: bytes ÷ (set ÷ nodes)."""
    some = sorted({round(k * (nodes - 1) / max(1, watched - 1)) for k in range(watched)})
    found = [_node(nodes, node) for node in some]
    row: dict[str, Any] = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
    most = {f"most_{key}": max(f[key] for f in found) for key in ("stretches", "pieces")}
    return {"nodes": nodes, **most, **row}


def _node(nodes: int, node: int) -> dict[str, float]:
    found: dict[str, float] = {}
    share = SAMPLES / nodes
    for shards in (256, 2048):
        size = SAMPLES // shards
        plan = BatchPlan([size] * shards, 0, nodes * RANKS * RANK_BATCH, nodes, node)
        windows = [plan.window_ids(w) for w in range(2 * plan.windows_per_epoch)]
        epoch = plan.windows_per_epoch
        stretches = sum(_stretches(ids, size) for ids in windows[:epoch])
        found["stretches"] = max(found.get("stretches", 0), stretches / share)
        first, again = _fetched(windows, epoch, np.full(shards, size), share)
        found[f"whole_{shards}"], found[f"whole_{shards}_again"] = first, again
        if shards == 256:
            of_shard = _pieces(size)
            pieces = np.tile(of_shard, shards)
            found["pieces"], found["pieces_again"] = _fetched(windows, epoch, pieces, share)
    return found


def _pieces(samples: int) -> np.ndarray:
    """Samples in each piece of a shard of images of equal size."""
    ends = np.array(cuts(BYTES * np.arange(samples), BYTES * samples))
    return np.diff(ends, prepend=0) // BYTES + (np.diff(ends, prepend=0) % BYTES > BYTES // 2)


def _stretches(ids: np.ndarray, size: int) -> int:
    """Samples from the first to the last that is read of each shard."""
    return sum(int(np.ptp(ids[ids // size == shard])) + 1 for shard in np.unique(ids // size))


def _fetched(
    windows: list[np.ndarray], epoch: int, sizes: np.ndarray, share: float
) -> tuple[float, float]:
    """Samples fetched in the first and in the second epoch ÷ the node's share, in parts of `sizes`.

    The parts of a window and of the next stay whatever the cache may hold.
    """
    ends = np.cumsum(sizes)
    read = [np.unique(np.searchsorted(ends, ids, side="right")).tolist() for ids in windows]
    kept: OrderedDict[int, None] = OrderedDict()
    room, fetched = CACHE * share / float(sizes.mean()), [0, 0]
    for number, wanted in enumerate(read):
        following = read[number + 1] if number + 1 < len(read) else []
        for part in wanted:
            fetched[number >= epoch] += int(sizes[part]) * (part not in kept)
            kept[part] = None
            kept.move_to_end(part)
        in_use = {*wanted, *following}
        for part in [p for p in kept if p not in in_use]:
            if len(kept) > room:
                del kept[part]
    return fetched[0] / share, fetched[1] / share


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
