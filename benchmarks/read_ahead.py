"""What reading ahead brings: random images out of shards that are not in the page cache.

    python -m benchmarks.read_ahead [--folder DIR] [--quick]

Two processes read every image of one window's shards once, in random order, as data workers do;
beside them runs nothing, or the read-ahead of data/storage/store.py. Before each round the files
are dropped from the page cache. Once as fast as the disk gives, once with a pause of 1.5 ms after
each image, the time a core needs to decode it. The shards are random bytes, 110 KB an image.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.common import Round, median, median_ratio, options_parser, parse, report, table
from data.storage.reader import ShardReader, WholeShards
from data.storage.store import read_ahead

IMAGE = 110_000
PROCESSES = 2
PAUSES = {"as fast as it goes": 0.0, "decoding": 0.0015}


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: /tmp)")
    options = parse(parser)
    shards, images, rounds = (4, 100, 1) if options.quick else (14, 1_800, 5)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = [_write(Path(folder) / f"{k}.tar", images) for k in range(shards)]
        timed = {name: _rounds(paths, images, pause, rounds) for name, pause in PAUSES.items()}
    count = shards * images
    rows = [
        [
            name,
            *(f"{count / median(taken, kind):,.0f}" for kind in ("plain", "ahead")),
            f"{median_ratio(taken, 'plain', 'ahead'):.2f}",
        ]
        for name, taken in timed.items()
    ]
    print(table(["images/s of two processes", "plain", "read ahead", "ratio"], rows))
    report(
        "read_ahead",
        ratio=median_ratio(timed["decoding"], "plain", "ahead"),
        target=1.0,
        device=torch.device("cpu"),
        details={"gb": round(count * IMAGE / 1e9, 2), "seconds": timed},
    )


def _write(path: Path, images: int) -> Path:
    with path.open("wb") as stream:
        for _ in range(images):
            stream.write(os.urandom(IMAGE))
        os.fsync(stream.fileno())
    return path


def _rounds(paths: list[Path], images: int, pause: float, rounds: int) -> list[Round]:
    kinds = ("plain", "ahead")
    return [
        {kind: _seconds(paths, images, pause, kind) for kind in kinds[:: -1 if number % 2 else 1]}
        for number in range(rounds)
    ]


def _seconds(paths: list[Path], images: int, pause: float, kind: str) -> float:
    for path in paths:
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    places = [(shard, i * IMAGE) for shard in range(len(paths)) for i in range(images)]
    random.Random(0).shuffle(places)
    readers = [
        multiprocessing.Process(target=_read, args=(paths, places[k::PROCESSES], pause))
        for k in range(PROCESSES)
    ]
    began = time.perf_counter()
    if kind == "ahead":
        threading.Thread(target=lambda: [read_ahead(path) for path in paths], daemon=True).start()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return time.perf_counter() - began


def _read(paths: list[Path], places: list[tuple[int, int]], pause: float) -> None:
    reader = ShardReader(WholeShards(paths))
    for shard, offset in places:
        reader.read(shard, offset, IMAGE)
        time.sleep(pause)


if __name__ == "__main__":
    main()
