"""Places elsewhere that have the digits, and batches from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.config import DataConfig
from data.packing.adopt import index_shards
from data.stream.pipeline import open_split, train_stream
from data.stream.plan import BatchPlan
from tests.data.conftest import MakeTar, image_bytes
from tests.data.servers import FileServer

Batches = list[dict[str, torch.Tensor]]


@pytest.fixture
def server(packed_digits: Path) -> Iterator[FileServer]:
    with FileServer(packed_digits).running() as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def pack_with_a_corrupt_one(folder: Path, make_tar: MakeTar, corrupt: tuple[int, int]) -> None:
    """Four shards of eight images, labelled by their places; that of shard and place is empty."""
    for shard in range(4):
        members = []
        for k in range(8):
            image = b"" if (shard, k) == corrupt else image_bytes(10 * shard + k)
            members += [(f"{shard}-{k}.png", image), (f"{shard}-{k}.cls", str(k).encode())]
        make_tar(folder / f"{shard}.tar", members)
    index_shards(folder, progress=False)


def config(path: str | Path, cache: Path, **options: Any) -> DataConfig:
    quick = {"retry_wait_s": 0.01, "fetch_timeout_s": 5, "retries": 4, "cache_dir": cache}
    sizes = {"image_size": 8, "eval_crop_ratio": 1.0}
    return DataConfig(**{"path": path, **sizes, **quick, **options})


def train(cfg: DataConfig, batch: int = 128, **options: Any) -> Batches:
    dataset = open_split(cfg, "train")
    plan = BatchPlan(dataset.shard_sizes, 3, batch)
    return list(train_stream(dataset, plan, cfg, **{"epochs": 1} | options))


def same(a: Batches, b: Batches) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture
def s3(packed_digits: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket with the digits, on a real S3 protocol server; found as users say where it is."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    # One of an earlier test would go on asking the server of that.
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    service = ThreadedMotoServer(port=0, verbose=False)
    service.start()
    host, port = service.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    for file in packed_digits.rglob("*.*"):
        name = f"digits/{file.relative_to(packed_digits)}"
        client.put_object(Bucket="shards", Key=name, Body=file.read_bytes())
    yield "s3://shards/digits"
    service.stop()
