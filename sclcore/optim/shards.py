"""What an engine declares where it made one flat tensor of a parameter group and cut it up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shard:
    """Elements `start` … `start + length` of the flattened tensor `name` of `shape`.

    They lie at `offset` in the flat tensor that stands for a parameter group.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    offset: int


def check_shards(group: dict[str, Any], number: int, shards: Sequence[Shard]) -> None:
    """ValueError where `shards` do not fit the tensors of parameter group `number`."""
    if not group["connections"]:
        raise ValueError(f"parameter group {number} has no connections, so no shards to declare")
    params, shapes = group["params"], dict(zip(group["names"], group["shapes"], strict=True))
    if len(params) != 1 or params[0].ndim != 1:
        raise ValueError(
            f"parameter group {number} holds {len(params)} tensor(s): where shards are declared, "
            "one flat tensor stands for the whole group, and no whole tensor may be beside it"
        )
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError(f"parameter group {number} has two shards of one tensor on this rank")
    for shard in shards:
        if tuple(shapes.get(shard.name, ())) != tuple(shard.shape):
            raise ValueError(f"parameter group {number} has no {shard.name} of shape {shard.shape}")
        end, size = shard.start + shard.length, math.prod(shard.shape)
        if not 0 <= shard.start <= end <= size:
            raise ValueError(f"{shard.name} has {size} elements, not {shard.start} to {end}")
        if not 0 <= shard.offset <= shard.offset + shard.length <= params[0].numel():
            raise ValueError(f"the shard of {shard.name} lies outside of its flat tensor")
