"""How a window's samples come into order, and how a global batch is dealt to the ranks.

Both know only places in a line: the ids of a window's samples, ascending, which is the order in
which they lie in its shards.
"""

from __future__ import annotations

import numpy as np

# A batch has its share of each of so many parts of the window, to within a sample or two. More of
# them would not help: a batch of 256 has one sample of each.
CELLS = 256
# Below so many samples in a cell its random order would not be random.
_LEAST_IN_A_CELL = 16


def spread(raw: np.ndarray) -> np.ndarray:
    """Return a random order of 0 … n - 1 in which any stretch has its share of any part.

    `raw`, uint64 [2 n], are random numbers. The line 0 … n - 1 is cut into equal cells. A round
    takes one sample of each, drawn at random without return; the cells of a round come in the
    order of van der Corput's sequence (their number's bits reversed) under a random digital shift
    (exclusive or), so that parts of a round are spread evenly as well.
    """
    count = len(raw) // 2
    cells = _cells_for(count)
    places = np.arange(count)
    cell = places * cells // max(1, count)
    drawn = np.lexsort((raw[:count], cell))
    rounds = np.empty(count, np.int64)
    rounds[drawn] = places - np.searchsorted(cell, np.arange(cells))[cell]
    shifts = (raw[count:] & np.uint64(cells - 1)).astype(np.int64)
    turns = _reversed_bits(cells)[cell] ^ shifts[rounds]
    return np.argsort(rounds * cells + turns, kind="stable")


def _cells_for(count: int) -> int:
    """The power of two of cells that `count` samples are cut into."""
    wanted = min(CELLS, max(1, count // _LEAST_IN_A_CELL))
    return 1 << (wanted.bit_length() - 1)


def _reversed_bits(cells: int) -> np.ndarray:
    numbers, found = np.arange(cells), np.zeros(cells, np.int64)
    for _ in range(cells.bit_length() - 1):
        found = found << 1 | numbers & 1
        numbers = numbers >> 1
    return found


def share(parts: list[np.ndarray], rank: int, world_size: int) -> list[np.ndarray]:
    """Return the contiguous stretch that `rank` gets of each part of a global batch.

    `parts` are the ids of a batch by window, each ascending; together they can be divided among
    the ranks, and each gets as many. Neighbours 2k and 2k + 1 of a part go to the same rank where
    all ranks' shares are even.
    """
    first, rest = parts[0], parts[1:]
    total = sum(map(len, parts))
    own = total // world_size
    unit = 2 if own % 2 == len(first) % 2 == 0 else 1
    # A rank's share of the first part, rounded down, and what it lacks of the rest: so each part
    # is cut at about the same shares of itself, and no rank needs all of a window's shards.
    cuts = [unit * (r * (len(first) // unit) // world_size) for r in (rank, rank + 1)]
    shares = [first[cuts[0] : cuts[1]]]
    if rest:
        begin, end = rank * own - cuts[0], (rank + 1) * own - cuts[1]
        shares.append(np.concatenate(rest)[begin:end])
    return shares
