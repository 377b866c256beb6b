"""How fast batches come: ours against bare JPEG decoding and against other loaders.

    python -m benchmarks.loader [--data DIR] [--quick] [--device cpu|cuda]

On the same shards and cores, with RandomResizedCrop(224) and flip, for 1 and 2 workers:

    limit        libjpeg-turbo (simplejpeg) decoding the same bytes to RGB, whole, from memory,
                 in as many processes as there are workers
    ours         data.stream.pipeline.train_stream, augment: imagenet
    webdataset   shuffle, decode("pil"), to_tuple, map_tuple, batched, WebLoader
    timm         its wds/ reader and create_loader, without its prefetcher
    torchvision  ImageFolder + DataLoader on the same JPEGs as files

A round takes each in turn, backwards every other time; quoted are medians over the rounds of
images per second and of the ratios. Ours may exceed the limit: it decodes no more than a crop
needs, least of all where data/images/_crop.c could be built. Without --data DIR (a folder with
train/, as `scl pack` writes it), photograph-like JPEGs of ImageNet's size distribution are
generated: about 0.75 bytes per pixel, about 400×350.

Also: seconds to the first batch, and to the first after resuming in the middle of epoch 7, of a set
of 10,000 shards (links to one); memory of opening it and planning an epoch. With --device cuda,
torchvision's decoder on the GPU against one core: whether a device decoder would pay there. The
last line is a JSON object; its ratios are the least over the numbers of workers.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import loader_peers as peers
from benchmarks.common import median, median_ratio, options_parser, parse, report, table
from benchmarks.loader_costs import first_batch_seconds, gpu_decoding, memory_of, synthetic_set
from benchmarks.photographs import write_class_folders
from data.images.region import native
from data.packing.pack import pack
from data.shards.manifest import load_manifest
from data.sources.image_folder import imagefolder

TARGET_LIMIT, TARGET_PEER = 0.9, 1.3
PEERS = ("webdataset", "timm", "torchvision")
# Distinct photographs, how often each is repeated, images per shard.
DATA = {False: (512, 8, 512), True: (32, 8, 64)}
SYNTHETIC = {False: (10_000, 128), True: (200, 128)}

Rates = dict[str, float]


def generate(folder: Path, quick: bool) -> Path:
    """Packed shards of generated photographs under `folder`."""
    distinct, times, per_shard = DATA[quick]
    write_class_folders(folder / "raw", distinct, times)
    pack(imagefolder(folder / "raw"), folder / "shards", shard_samples=per_shard, progress=False)
    return folder / "shards"


def steady_rate(stream: Iterator[Any], batch: int, workers: int, batches: int) -> float:
    """Images per second once all workers run; the consumer only takes."""
    for _ in range(2 * workers):
        next(stream)
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    taken = time.perf_counter() - began
    stream.close()  # type: ignore[attr-defined]
    return batches * batch / taken


def rates(
    shards: Path, files: Path, workers: int, batch: int, batches: int, rounds: int
) -> list[Rates]:
    """Images per second of each in each round."""
    calls: dict[str, Callable[[], float]] = {
        "limit": lambda: peers.decoding_rate(shards, workers, batch * batches)
    }
    for name in ("ours", *PEERS):
        place = files if name == "torchvision" else shards
        calls[name] = lambda name=name, place=place: steady_rate(
            getattr(peers, name)(place, workers, batch), batch, workers, batches
        )
    return [
        {name: calls[name]() for name in (reversed(calls) if number % 2 else calls)}
        for number in range(rounds)
    ]


def compare(
    shards: Path, files: Path, workers: int, batch: int, batches: int, rounds: int
) -> dict[str, Any]:
    taken = rates(shards, files, workers, batch, batches, rounds)
    names = ("limit", "ours", *PEERS)
    best = max(PEERS, key=lambda name: median(taken, name))
    return {
        "workers": workers,
        "images_per_s": {name: round(median(taken, name), 1) for name in names},
        "spread": {name: round(_spread(taken, name), 3) for name in names},
        "ratio_to_decode_limit": median_ratio(taken, "ours", "limit"),
        "best_peer": best,
        "ratio_to_best_peer": median_ratio(taken, "ours", best),
    }


def _spread(taken: list[Rates], name: str) -> float:
    """Largest less smallest, over the median."""
    values = [r[name] for r in taken]
    return (max(values) - min(values)) / statistics.median(values)


def print_rates(results: list[dict[str, Any]]) -> None:
    names = ("limit", "ours", *PEERS)
    header = ["images/s (spread)", *names, "ours / limit", "ours / best peer"]
    rows = [
        [
            f"{r['workers']} worker(s)",
            *(f"{r['images_per_s'][n]:,.0f} ({r['spread'][n]:.0%})" for n in names),
            f"{r['ratio_to_decode_limit']:.3f}",
            f"{r['ratio_to_best_peer']:.2f} ({r['best_peer']})",
        ]
        for r in results
    ]
    print(table(header, rows))


def costs(folder: Path, shards: Path, quick: bool) -> dict[str, Any]:
    """What starting, resuming and a large set cost."""
    count, per_shard = SYNTHETIC[quick]
    large = synthetic_set(shards, folder / "large", count, per_shard)
    return {
        "first_batch_s": round(first_batch_seconds(shards, epoch=0), 2),
        "large_set": {"shards": count, "samples": count * per_shard},
        "large_first_batch_s": round(first_batch_seconds(large, epoch=0), 2),
        "large_middle_of_epoch_7_s": round(first_batch_seconds(large, epoch=6, middle=True), 2),
        "large_memory_mb": {name: round(mb, 1) for name, mb in memory_of(large).items()},
    }


def measure(options: Any, folder: Path) -> dict[str, Any]:
    shards = options.data or generate(folder, options.quick)
    files = folder / "files"
    peers.unpack(shards / "train", files)
    batch, batches, rounds = (32, 4, 1) if options.quick else (256, 16, options.rounds)
    results = [
        compare(shards, files, workers, batch, batches, rounds)
        for workers in ([1] if options.quick else [1, 2])
    ]
    manifest = load_manifest(shards / "train")
    size = sum(shard.bytes for shard in manifest.shards) / manifest.samples
    what = f"shards in {options.data}" if options.data else "generated photograph-like JPEGs"
    print(f"{what}, {manifest.samples:,} images of {size / 1000:.0f} KB; batch {batch}")
    print(f"compiled decoder (data/images/_crop.c): {'built' if native else 'not built'}")
    print_rates(results)
    details = {
        "data": "given" if options.data else "generated",
        "images": manifest.samples,
        "bytes_per_image": round(size),
        "compiled_decoder": native is not None,
        "batch": batch,
        "rounds": rounds,
        "rates": results,
        "costs": costs(folder, shards, options.quick),
    }
    for name, value in details["costs"].items():
        print(f"{name}: {value}")
    if options.device == "cuda":
        details["gpu_decoding"] = gpu_decoding(shards)
        print(f"decoding on the GPU: {details['gpu_decoding']}")
    return details


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--data", type=Path, help="packed shards to use (default: generated)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    options = parse(parser)
    with tempfile.TemporaryDirectory(prefix="scl-loader-") as folder:
        details = measure(options, Path(folder))
    to_limit = min(r["ratio_to_decode_limit"] for r in details["rates"])
    to_peer = min(r["ratio_to_best_peer"] for r in details["rates"])
    report(
        "loader",
        ratio=to_limit,
        target=TARGET_LIMIT,
        device=torch.device(options.device),
        details=details,
        also={
            "ratio_to_decode_limit": round(to_limit, 6),
            "ratio_to_best_peer": round(to_peer, 6),
            "target_to_best_peer": TARGET_PEER,
        },
    )


if __name__ == "__main__":
    main()
