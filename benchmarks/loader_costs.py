"""What benchmarks.loader measures beside throughput: starting, resuming, memory, GPU decoding."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.loader_peers import SIZE, images_of
from data.config import DataConfig
from data.files import sha256_of
from data.shards.index import SampleIndex
from data.shards.manifest import INDEX_NAME, load_manifest, write_manifest
from data.stream.pipeline import open_split, train_stream
from data.stream.plan import BatchPlan

BATCH = 256


def synthetic_set(shards: Path, out: Path, count: int, per_shard: int) -> Path:
    """A set of `count` shards that are links to the first of `shards`/train, over and over."""
    manifest = load_manifest(shards / "train")
    index = SampleIndex.load(shards / "train" / INDEX_NAME)
    first, folder = manifest.shards[0], out / "train"
    folder.mkdir(parents=True)
    infos = []
    for number in range(count):
        name = f"shard-{number:06d}.tar"
        (folder / name).symlink_to((shards / "train" / first.name).resolve())
        infos.append(first.model_copy(update={"name": name, "samples": per_shard}))
    rows = np.arange(per_shard) % first.samples
    repeated = {name: np.tile(getattr(index, name)[rows], count) for name in ("offset", "size")}
    numbers = np.repeat(np.arange(count, dtype=np.int32), per_shard)
    labels = np.tile(index.label[rows], count)
    SampleIndex(shard=numbers, label=labels, **repeated).save(folder / INDEX_NAME)
    changes = {
        "samples": count * per_shard,
        "shards": infos,
        "index_sha256": sha256_of(folder / INDEX_NAME),
    }
    write_manifest(folder, manifest.model_copy(update=changes))
    return out


def first_batch_seconds(shards: Path, *, epoch: int, middle: bool = False) -> float:
    """From opening the set to the first batch of an epoch, or of its middle, with 1 worker."""
    began = time.perf_counter()
    dataset, plan, config = _opened(shards, workers=1)
    stream = train_stream(
        dataset,
        plan,
        config,
        start_epoch=epoch,
        start_step=plan.steps_per_epoch // 2 if middle else 0,
        epochs=epoch + 1,
    )
    next(stream)
    taken = time.perf_counter() - began
    stream.close()  # type: ignore[attr-defined]
    return taken


def memory_of(shards: Path) -> dict[str, float]:
    """Growth of the resident memory, MB: by opening the set, and by an epoch's plan on top."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_measure_memory, args=(shards, queue))
    process.start()
    process.join(timeout=300)
    return queue.get()


def _measure_memory(shards: Path, queue: Any) -> None:
    before = psutil.Process().memory_info().rss
    dataset, plan, _ = _opened(shards, workers=0)
    opened = psutil.Process().memory_info().rss
    batches = plan.micro_batches(6, plan.steps_per_epoch // 2)
    next(batches)
    planned = psutil.Process().memory_info().rss
    queue.put({"open": (opened - before) / 1e6, "plan": (planned - opened) / 1e6})
    del dataset


def _opened(shards: Path, workers: int) -> tuple[Any, BatchPlan, DataConfig]:
    config = DataConfig(
        path=shards, image_size=SIZE, augment="imagenet", hflip=True, workers=workers
    )
    dataset = open_split(config, "train")
    batch = min(BATCH, len(dataset))
    return dataset, BatchPlan(dataset.shard_sizes, seed=0, global_batch_size=batch), config


def gpu_decoding(shards: Path, batch: int = 256, rounds: int = 10) -> dict[str, float]:
    """Images per second of nvJPEG through torchvision, in batches, and of one core here."""
    import simplejpeg
    from torchvision.io import decode_jpeg

    contents = [
        content for content, _ in zip(images_of(shards / "train"), range(batch), strict=False)
    ]
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    decode_jpeg(tensors, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(rounds):
        decode_jpeg(tensors, device="cuda")
    torch.cuda.synchronize()
    on_gpu = rounds * len(tensors) / (time.perf_counter() - began)
    began = time.perf_counter()
    for content in contents:
        simplejpeg.decode_jpeg(content)
    return {
        "gpu_images_per_s": round(on_gpu, 1),
        "core_images_per_s": round(len(contents) / (time.perf_counter() - began), 1),
    }
