"""Shards that come in pieces: no more than a node reads, and the batches of the folder."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.packing.pieces import add_pieces
from data.shards import pieces as pieces_module
from data.shards.pieces import PIECES_NAME, parse_pieces
from data.stream import plan as plan_module
from data.stream.pipeline import eval_stream, open_split, train_stream
from data.stream.plan import BatchPlan
from tests.data.conftest import MakeTar
from tests.data.servers import FileServer, Wire
from tests.data.storage.conftest import Batches, config, pack_with_a_corrupt_one, same, train


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a shard of the digits, 84 samples, comes in pieces of four."""
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 1_000)
    monkeypatch.setattr(pieces_module, "LEAST_SAMPLES", 4)
    # 17 shards in two windows: about the shards of a window of ImageNet.
    monkeypatch.setattr(plan_module, "WINDOW", 760)


@pytest.fixture
def digits(packed_digits: Path, tmp_path: Path) -> Path:
    """The digits, cut."""
    folder = shutil.copytree(packed_digits, tmp_path / "digits")
    for split in ("train", "val"):
        add_pieces(folder / split, progress=False)
    return folder


@pytest.fixture
def server(digits: Path) -> Iterator[FileServer]:
    with FileServer(digits).running() as running:
        yield running


@pytest.mark.parametrize(("kind", "nodes", "each"), [("http", 14, 25), ("s3", 4, 16)])
def test_a_node_fetches_its_share(
    kind: str,
    nodes: int,
    each: int,
    digits: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes are counted on the wire, headers and all; together the nodes read what one reads."""
    if kind == "http":
        server = request.getfixturevalue("server")
        port, path = int(server.url.rpartition(":")[2]), "http://127.0.0.1:{}"
    else:
        path = request.getfixturevalue("s3")
        port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
        content = (digits / "train" / PIECES_NAME).read_bytes()
        name = f"digits/train/{PIECES_NAME}"
        pytest.importorskip("boto3").client("s3").put_object(
            Bucket="shards", Key=name, Body=content
        )
    read: dict[int, list[int]] = {}
    ratios = []
    with Wire(port).running() as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{wire.port}")
        for node in range(nodes):
            cfg = config(path.format(wire.port), tmp_path / f"cache-{node}", fetch_timeout_s=20)
            dataset = open_split(cfg, "train")
            before = wire.received
            plan = BatchPlan(dataset.shard_sizes, 3, nodes * each, nodes, node)
            for step, batch in enumerate(train_stream(dataset, plan, cfg, epochs=1)):
                read.setdefault(step, []).extend(batch["id"].tolist())
            content = sum(shard.bytes for shard in dataset.manifest.shards)
            ratios.append((wire.received - before) / (content / nodes))
    # At each edge of its part of a window, 54 samples or more, it fetches half a piece too much.
    assert min(ratios) > 0.95 and max(ratios) < 1.25
    alone = BatchPlan(dataset.shard_sizes, 3, plan.global_batch_size)
    assert [sorted(ids) for ids in read.values()] == [
        sorted(ids.tolist()) for ids in alone.micro_batches(0)
    ]


@pytest.mark.parametrize("mood", ["", "drop", "wrong"])
def test_pieces_give_the_batches_of_the_folder(
    digits: Path, server: FileServer, tmp_path: Path, mood: str
) -> None:
    cache = tmp_path / "cache"
    cfg = config(server.url, cache, workers=0 if mood else 2)
    pieces = parse_pieces((digits / "train" / PIECES_NAME).read_bytes(), "pieces")
    # At the second piece of each shard.
    server.mood = lambda path, before: mood if path.endswith(".tar") and before == 1 else ""
    assert same(train(cfg, epochs=2), train(config(digits, cache), epochs=2))
    wanted = [part for path, part in server.requests if path.endswith(".tar")]
    # Each once, by its bytes, but for those that were cut short or were wrong; and the question
    # whether the server knows ranges.
    assert all(part and not part.endswith("-") for part in wanted)
    count = sum(len(of_shard.ends) for of_shard in pieces)
    assert len(list(cache.glob("*.tar"))) == count > 250
    assert len(wanted) == count + 1 + (len(pieces) if mood else 0)
    val, local = open_split(cfg, "val"), open_split(config(digits, cache), "val")
    assert same([*eval_stream(val, cfg)], [*eval_stream(local, config(digits, cache))])


@pytest.mark.parametrize("lacks", ["ranges", "list", "its own list"])
def test_shards_come_whole_where_pieces_cannot(
    digits: Path,
    server: FileServer,
    tmp_path: Path,
    lacks: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = digits / "train" / PIECES_NAME
    if lacks == "ranges":
        server.mood = lambda path, before: "no ranges"
    elif lacks == "list":
        path.unlink()
    else:
        path.write_bytes((digits / "val" / PIECES_NAME).read_bytes())
    cache = tmp_path / "cache"
    with caplog.at_level(logging.WARNING, "data"):
        assert same(train(config(server.url, cache)), train(config(digits, cache)))
    assert len(list(cache.glob("*.tar"))) == 17
    assert ("is of other shards" in caplog.text) == (lacks == "its own list")


def test_a_neighbour_is_fetched_from_another_piece(
    tmp_path: Path, make_tar: MakeTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corrupt sample is replaced as in the folder, by one that its node would not read."""
    monkeypatch.setattr(pieces_module, "LEAST_SAMPLES", 2)
    monkeypatch.setattr(plan_module, "WINDOW", 16)
    pack_with_a_corrupt_one(tmp_path / "set" / "train", make_tar, (1, 3))
    replaced = []
    with FileServer(tmp_path / "set").running() as server:
        for rank in range(4):
            here = config(tmp_path / "set", tmp_path / "unused", image_size=12)
            there = config(server.url, tmp_path / f"cache-{rank}", image_size=12)
            streams: list[Batches] = []
            for cfg in (here, there):
                dataset = open_split(cfg, "train")
                plan = BatchPlan(dataset.shard_sizes, 3, 16, 4, rank)
                streams.append([*train_stream(dataset, plan, cfg, epochs=1)])
            assert same(*streams)
            replaced += [b["label"][b["corrupt"] == 1].tolist() for b in streams[1]]
    assert [labels for labels in replaced if labels] == [[4]]
