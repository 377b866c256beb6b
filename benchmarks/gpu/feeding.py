"""Whether the loader feeds the card: images/s of the loader, of the step, and of both together."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import timm
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.common import synchronize
from benchmarks.gpu.parts import Measuring
from benchmarks.gpu.training import BATCH, scl
from benchmarks.photographs import CLASSES, jpeg
from data.config import DataConfig
from data.packing.adopt import index_shards
from data.stream.pipeline import normalise, open_split, train_stream
from data.stream.plan import BatchPlan

Batches = Iterator[dict[str, Tensor]]


def run(measuring: Measuring) -> None:
    batch, size = (8, 32) if measuring.is_rehearsal else (BATCH, 224)
    distinct, shards = (8, 2) if measuring.is_rehearsal else (96, 8)
    workers, prefetch = _fitting(1 if measuring.is_rehearsal else None, 3 * batch * size**2)
    if not workers:
        measuring.add("left out", "/dev/shm has no room for three batches")
        return
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder) / "train", distinct, shards, 2 * batch)
        config = DataConfig(path=folder, image_size=size, augment="imagenet", hflip=True)
        config = config.model_copy(update={"workers": workers, "prefetch": prefetch})
        dataset = open_split(config, "train")
        plan = BatchPlan(dataset.shard_sizes, 0, batch)
        batches = train_stream(dataset, plan, config, epochs=10**6)
        step = _step(measuring.device, batch, size, lambda: dataset.manifest.image)
        measuring.add("workers", workers)
        count = max(2, workers)
        for _ in range(count):
            step(next(batches))
        alone = next(batches)
        rates = {
            "the loader alone": _rate(lambda: next(batches), measuring, batch, count),
            "the step alone, the same batch": _rate(lambda: step(alone), measuring, batch, count),
            "a step from the loader": _rate(lambda: step(next(batches)), measuring, batch, count),
        }
        for name, rate in rates.items():
            measuring.add(f"ResNet-50, {name}", rate, "images/s")
        fed = rates["a step from the loader"] / rates["the step alone, the same batch"]
        measuring.add("fed ÷ the step alone", fed, "×")


def _fitting(workers: int | None, batch_bytes: int) -> tuple[int, int]:
    """Workers (None: as many as there are cores, less one) and batches ahead of each.

    Containers often have little shared memory, and a worker that meets its end there is killed.
    """
    workers = workers or max(1, len(os.sched_getaffinity(0)) - 1)
    room = shutil.disk_usage("/dev/shm").free // 2 // batch_bytes - 2
    prefetch = max(1, min(4, room // workers))
    return max(0, min(workers, room // prefetch)), prefetch


def _rate(call: Callable[[], object], measuring: Measuring, batch: int, least: int) -> float:
    """Images per second over a fifth of the time that is left, or `least` batches."""
    end = time.monotonic() + (0 if measuring.is_rehearsal else measuring.left_s / 5)
    synchronize(measuring.device)
    began, done = time.perf_counter(), 0
    while done < least or time.monotonic() < end:
        call()
        done += 1
    synchronize(measuring.device)
    return done * batch / (time.perf_counter() - began)


def _step(device: torch.device, batch: int, size: int, stats: Callable) -> Callable:
    model = timm.create_model("resnet50", num_classes=CLASSES).to(device)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = scl(model)

    def step(loaded: dict[str, Tensor]) -> None:
        images = normalise(loaded["image"].to(device, non_blocking=True), stats())
        labels = loaded["label"].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _write(folder: Path, distinct: int, shards: int, per_shard: int) -> None:
    """Shards of generated photographs, without webdataset."""
    folder.mkdir(parents=True)
    photographs = [jpeg(number) for number in range(distinct)]
    for shard in range(shards):
        with tarfile.open(folder / f"shard-{shard:06d}.tar", "w") as tar:
            for k in range(per_shard):
                number = shard * per_shard + k
                label = str(number % CLASSES).encode()
                for kind, content in (("jpg", photographs[number % distinct]), ("cls", label)):
                    info = tarfile.TarInfo(f"{number:08d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
    index_shards(folder, progress=False)
