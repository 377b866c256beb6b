"""The loaders that benchmarks.loader compares: each yields batches for ever, the same augmentation.

All crop with RandomResizedCrop(224) and flip. webdataset and torchvision stop at uint8, as ours
does, which is less work than the float tensors of their documentation; timm runs as it comes.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from itertools import repeat
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets
from torchvision.transforms import v2

from data.config import DataConfig
from data.shards.index import SampleIndex
from data.shards.manifest import INDEX_NAME, load_manifest
from data.stream.pipeline import open_split, train_stream
from data.stream.plan import BatchPlan

SIZE = 224
_ENDLESS = 10**6


def images_of(folder: Path) -> Iterator[bytes]:
    """The image bytes of a packed split, in order."""
    index, manifest = SampleIndex.load(folder / INDEX_NAME), load_manifest(folder)
    for number, shard in enumerate(manifest.shards):
        with (folder / shard.name).open("rb") as stream:
            for i in (index.shard == number).nonzero()[0]:
                stream.seek(int(index.offset[i]))
                yield stream.read(int(index.size[i]))


def unpack(folder: Path, target: Path) -> None:
    """Write a packed split as class folders, for ImageFolder."""
    labels = SampleIndex.load(folder / INDEX_NAME).label
    for number, (content, label) in enumerate(zip(images_of(folder), labels, strict=True)):
        path = target / f"{label:04d}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def ours(shards: Path, workers: int, batch: int) -> Iterator[Any]:
    config = DataConfig(
        path=shards, image_size=SIZE, augment="imagenet", hflip=True, workers=workers
    )
    dataset = open_split(config, "train")
    plan = BatchPlan(dataset.shard_sizes, seed=0, global_batch_size=batch)
    return train_stream(dataset, plan, config, epochs=_ENDLESS)


def webdataset(shards: Path, workers: int, batch: int) -> Iterator[Any]:
    import webdataset

    # Its names are made at run time.
    wds: Any = webdataset
    urls = sorted(str(path) for path in (shards / "train").glob("*.tar"))
    samples = (
        wds.WebDataset(urls, resampled=True, shardshuffle=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;png", "cls")
        .map_tuple(_transform(), int)
        .batched(batch)
    )
    yield from wds.WebLoader(samples, batch_size=None, num_workers=workers)


def timm(shards: Path, workers: int, batch: int) -> Iterator[Any]:
    from timm.data.dataset_factory import create_dataset
    from timm.data.loader import create_loader

    manifest = load_manifest(shards / "train")
    names = f"train/shard-{{000000..{len(manifest.shards) - 1:06d}}}.tar"
    dataset: Any = create_dataset(
        "wds/",
        root=str(shards),
        split=f"{names}|{manifest.samples}",
        is_training=True,
        batch_size=batch,
    )
    loader: Any = create_loader(
        dataset,
        input_size=(3, SIZE, SIZE),
        batch_size=batch,
        is_training=True,
        num_workers=workers,
        use_prefetcher=False,
        color_jitter=0,
        interpolation="bilinear",
        persistent_workers=True,
        device=torch.device("cpu"),
    )
    for _ in repeat(None):
        yield from loader


def torchvision(folders: Path, workers: int, batch: int) -> Iterator[Any]:
    dataset = datasets.ImageFolder(str(folders), _transform())
    sampler = RandomSampler(dataset, replacement=True, num_samples=batch * _ENDLESS)
    yield from DataLoader(dataset, batch, sampler=sampler, num_workers=workers)


def _transform() -> v2.Compose:
    return v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def decoding_rate(shards: Path, processes: int, images: int) -> float:
    """Images per second that bare libjpeg-turbo decodes to RGB, in so many processes at once."""
    context = multiprocessing.get_context("forkserver")
    barrier, queue = context.Barrier(processes), context.SimpleQueue()
    workers = [
        context.Process(
            target=_decode, args=(shards / "train", images // processes, barrier, queue)
        )
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    slowest = max(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
    return images // processes * processes / slowest


def _decode(folder: Path, images: int, barrier: Barrier, queue: Any) -> None:
    contents = [content for content, _ in zip(images_of(folder), range(images), strict=False)]
    barrier.wait()
    began = time.perf_counter()
    for number in range(images):
        simplejpeg.decode_jpeg(contents[number % len(contents)])
    queue.put(time.perf_counter() - began)
