"""Shards that are elsewhere: the same batches, through a network that fails in every way."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import DataError
from data.shards.manifest import ShardInfo, load_manifest
from data.storage.cache import ShardCache
from data.storage.remote import open_source, without_secrets
from data.stream import dataset as dataset_module
from data.stream import plan as plan_module
from data.stream.pipeline import eval_stream, open_split, train_stream
from data.stream.plan import BatchPlan
from tests import forkserver
from tests.data.conftest import MakeTar
from tests.data.servers import FileServer, Wire
from tests.data.storage.conftest import config, pack_with_a_corrupt_one, same, train

ROOT = Path(__file__).parents[3]


def shards_in(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.tar"))


def bytes_in(cache: Path) -> int:
    total = 0
    for file in shards_in(cache):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


@pytest.mark.parametrize("workers", [0, 2])
def test_http_gives_the_batches_of_the_folder(
    packed_digits: Path, server: FileServer, cache: Path, workers: int
) -> None:
    cfg = config(server.url, cache, workers=workers)
    assert same(train(cfg, epochs=2), train(config(packed_digits, cache), epochs=2))
    # Both epochs and all workers live on one copy of each shard.
    assert set(server.asked().values()) == {1}
    val = list(eval_stream(open_split(cfg, "val"), cfg))
    local = config(packed_digits, cache)
    assert same(val, list(eval_stream(open_split(local, "val"), local)))


def test_a_second_run_fetches_only_the_manifest(server: FileServer, cache: Path) -> None:
    cfg = config(server.url, cache)
    first = train(cfg)
    server.requests.clear()
    assert same(first, train(cfg))
    assert list(server.asked()) == ["/train/manifest.json"]


def test_windows_are_fetched_one_ahead(
    packed_digits: Path, server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "WINDOW", 200)
    dataset = open_split(config(server.url, cache), "train")
    plan = BatchPlan(dataset.shard_sizes, 3, 20)
    stream = train_stream(dataset, plan, config(server.url, cache), epochs=1)
    next(stream)
    ids = [plan.window_ids(window) for window in (0, 1)]
    expected = {stretch.shard for part in ids for stretch in dataset.stretches(part)}
    deadline = time.monotonic() + 20
    while len(shards_in(cache)) < len(expected) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert {p.stem for p in shards_in(cache)} == {
        dataset.manifest.shards[shard].sha256 for shard in expected
    }
    rest = list(stream)
    assert len(rest) == plan.steps_per_epoch - 1
    local = config(packed_digits, cache)
    again = list(train_stream(open_split(local, "train"), plan, local, epochs=1))
    assert same(again[1:], rest)


@pytest.mark.parametrize("mood", ["drop", "stall", "busy", "wrong"])
def test_a_failing_connection_is_tried_again(
    packed_digits: Path, server: FileServer, cache: Path, mood: str
) -> None:
    server.mood = lambda path, before: mood if before == 0 else ""
    cfg = config(server.url, cache, fetch_timeout_s=0.5)
    assert same(train(cfg), train(config(packed_digits, cache)))
    shards = {path: n for path, n in server.asked().items() if path.endswith(".tar")}
    assert set(shards.values()) == {2}


def test_a_broken_transfer_goes_on_where_it_was(server: FileServer, cache: Path) -> None:
    server.mood = lambda path, before: "drop" if path.endswith(".tar") and before < 3 else ""
    assert train(config(server.url, cache))
    shard = next(path for path in server.asked() if path.endswith(".tar"))
    starts = [wanted for path, wanted in server.requests if path == shard]
    numbers = [int(wanted[6:-1]) for wanted in starts[1:]]
    assert starts[0] == ""
    assert numbers == sorted(set(numbers)) and len(numbers) == 3
    # A server without ranges starts over, and what has come is skipped.
    shutil.rmtree(cache)
    server.requests.clear()
    server.mood = lambda path, before: "drop" if before == 0 else "no ranges"
    assert train(config(server.url, cache))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("busy", "tried 3 times; the last time: the server answers 503 Service Unavailable"),
        ("wrong", "tried 3 times; the last time: .* that came are not the .* of the manifest"),
    ],
)
def test_a_shard_that_stays_unreachable_ends_the_run_with_its_name(
    server: FileServer, cache: Path, mood: str, reason: str, workers: int
) -> None:
    server.mood = lambda path, before: mood if path.endswith("shard-000002.tar") else ""
    cfg = config(server.url, cache, workers=workers, retries=2)
    name = re.escape(f"{server.url}/train/shard-000002.tar")
    with pytest.raises(DataError, match=rf"^{name} cannot be read \({reason}"):
        train(cfg)
    # The other fetches end soon after, and leave nothing.
    deadline = time.monotonic() + 20
    while list(cache.glob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_not_there_is_said_at_once(server: FileServer, cache: Path) -> None:
    with pytest.raises(DataError, match=r"/test/manifest.json .*tried once.* 404 Not Found"):
        open_split(config(server.url, cache), "test")
    address = server.url.rpartition(":")[0] + ":9"
    with pytest.raises(DataError, match=r"tried 2 times; .*refused"):
        open_split(config(address, cache, retries=1), "train")


def test_an_index_of_other_shards_is_not_used(
    packed_digits: Path, tmp_path: Path, cache: Path
) -> None:
    copy = shutil.copytree(packed_digits, tmp_path / "copy")
    shutil.copy(copy / "val" / "index.npz", copy / "train" / "index.npz")
    with (
        FileServer(copy).running() as server,
        pytest.raises(DataError, match=r"train/index.npz cannot be read .*not the one"),
    ):
        open_split(config(server.url, cache), "train")


def test_pipe_reads_what_a_command_writes(packed_digits: Path, cache: Path, tmp_path: Path) -> None:
    quoted = shutil.copytree(packed_digits, tmp_path / "it's here")
    cfg = config(f"pipe:cat {shlex.quote(str(quoted))}/{{}}", cache, workers=2)
    assert same(train(cfg), train(config(packed_digits, cache)))


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo gone: {} >&2; exit 3", r"the command ended with code 3: gone: train/manifest.json"),
        ("sleep 60; echo {}", r"nothing came for 0.3 s"),
    ],
)
def test_a_failing_command_is_reported(command: str, reason: str, cache: Path) -> None:
    cfg = config(f"pipe:{command}", cache, retries=1, fetch_timeout_s=0.3)
    with pytest.raises(DataError, match=reason):
        open_split(cfg, "train")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("pipe:cat /data/set.tar", r"has no \{\} to put the file's name in"),
        ("gs://bucket/set", r"gs://bucket/set needs the package gcsfs: .*pip install gcsfs"),
        ("nowhere://bucket/set", r"nothing here reads nowhere://"),
    ],
)
def test_a_path_that_cannot_be_read_is_refused(path: str, sentence: str, cache: Path) -> None:
    with pytest.raises(DataError, match=sentence):
        open_split(config(path, cache), "train")


def test_secrets_of_a_url_stay_out_of_messages(server: FileServer, cache: Path) -> None:
    assert without_secrets("https://me:pass@host:1/a?sig=x") == "https://host:1/a"
    server.mood = lambda path, before: "busy"
    with pytest.raises(DataError) as raised:
        open_split(config(f"{server.url}?sig=hidden", cache, retries=0), "train")
    assert "hidden" not in str(raised.value)


def test_signed_urls_keep_their_query(packed_digits: Path, server: FileServer) -> None:
    (content,) = open_source(f"{server.url}/train/?sig=x", 5).chunks("manifest.json", 0)
    assert content == (packed_digits / "train" / "manifest.json").read_bytes()


def test_s3_gives_the_batches_of_the_folder(s3: str, packed_digits: Path, cache: Path) -> None:
    cfg = config(s3, cache, workers=2, fetch_timeout_s=20)
    assert same(train(cfg), train(config(packed_digits, cache)))
    with pytest.raises(DataError, match=r"s3://shards/digits/test/manifest.json .*tried once"):
        open_split(cfg, "test")


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_node_fetches_its_share(
    kind: str,
    packed_digits: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes are counted on the wire of each node; together the nodes read what one reads."""
    # 17 shards of 84 or 85 digits in two windows: about the shards of a window of ImageNet.
    monkeypatch.setattr(plan_module, "WINDOW", 760)
    nodes = 4
    if kind == "http":
        server = request.getfixturevalue("server")
        port, path = int(server.url.rpartition(":")[2]), "http://127.0.0.1:{}"
    else:
        path = request.getfixturevalue("s3")
        port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    read: dict[int, list[int]] = {}
    with Wire(port).running() as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{wire.port}")
        for node in range(nodes):
            cfg = config(path.format(wire.port), tmp_path / f"cache-{node}", fetch_timeout_s=20)
            dataset = open_split(cfg, "train")
            before = wire.received
            plan = BatchPlan(dataset.shard_sizes, 3, 64, nodes, node)
            for step, batch in enumerate(train_stream(dataset, plan, cfg, epochs=1)):
                read.setdefault(step, []).extend(batch["id"].tolist())
            content = sum(shard.bytes for shard in dataset.manifest.shards)
            # Its share of each window, and for each window a shard more at the edges of that.
            edges = 2 * 2 * max(shard.bytes for shard in dataset.manifest.shards)
            fetched = wire.received - before
            assert content / nodes < fetched < 1.02 * (content / nodes + edges)
    alone = BatchPlan(dataset.shard_sizes, 3, 64)
    assert [sorted(ids) for ids in read.values()] == [
        sorted(ids.tolist()) for ids in alone.micro_batches(0)
    ]


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_covers_each_sample_once(
    server: FileServer, cache: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "STAGE_SHARDS", 2)
    cfg = config(server.url, cache, eval_batch_size=50)
    ranks = [list(eval_stream(open_split(cfg, "val"), cfg, world, r)) for r in range(world)]
    seen = torch.cat([batch["id"][batch["valid"]] for rank in ranks for batch in rank])
    assert seen.tolist() == list(range(360))


def test_a_corrupt_sample_is_replaced_from_its_own_shard(
    tmp_path: Path, cache: Path, make_tar: MakeTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next shard may not have been fetched, or may have gone again."""
    monkeypatch.setattr(plan_module, "WINDOW", 8)
    pack_with_a_corrupt_one(tmp_path / "set" / "train", make_tar, (1, 7))
    with FileServer(tmp_path / "set").running() as server:
        remote = train(config(server.url, cache, image_size=12), batch=8, epochs=2)
    assert same(remote, train(config(tmp_path / "set", cache, image_size=12), batch=8, epochs=2))
    labels = [b["label"][b["corrupt"] == 1].tolist() for b in remote if b["corrupt"].any()]
    assert labels == [[0], [0]]


# The cache.


def test_a_limit_below_what_is_read_at_a_time_is_refused(server: FileServer, cache: Path) -> None:
    with pytest.raises(DataError, match=r"cache_gb is 1e-05, but .* read from 0.00\d+ GB"):
        open_split(config(server.url, cache, cache_gb=1e-5), "train")


def test_the_limit_is_kept_and_the_least_recently_used_goes(
    packed_digits: Path, server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "WINDOW", 100)
    shard_bytes = max(shard.bytes for shard in load_manifest(packed_digits / "train").shards)
    cfg = config(server.url, cache, cache_gb=7 * shard_bytes / 1e9)
    dataset = open_split(cfg, "train")
    plan = BatchPlan(dataset.shard_sizes, 3, 20)
    largest = 0
    for _ in train_stream(dataset, plan, cfg, epochs=2):
        largest = max(largest, bytes_in(cache))
    assert 0 < largest <= 7 * shard_bytes
    assert max(server.asked().values()) >= 2


def test_a_shard_in_use_is_never_removed(packed_digits: Path, cache: Path) -> None:
    shards = load_manifest(packed_digits / "train").shards
    contents = {s.sha256: (packed_digits / "train" / s.name).read_bytes() for s in shards}
    small = ShardCache(cache, 2 * shards[0].bytes + 10)

    def bring(shard: ShardInfo, **how: Any) -> Callable[[], None]:
        release = small.bring(shard, lambda stream: stream.write(contents[shard.sha256]), **how)
        return release or (lambda: None)

    release = bring(shards[0])
    bring(shards[1])()
    bring(shards[2])()
    assert small.path(shards[0]).exists()
    assert not small.path(shards[1]).exists()
    keep = bring(shards[2])
    # All room is taken: what is not urgent waits, what is goes over the limit.
    stopped = threading.Event()
    waiting = threading.Thread(
        target=lambda: bring(shards[3], urgent=lambda: False, stopped=stopped.is_set)
    )
    waiting.start()
    time.sleep(0.3)
    assert not small.path(shards[3]).exists()
    stopped.set()
    waiting.join(10)
    assert not waiting.is_alive()
    bring(shards[3], urgent=lambda: True)()
    assert len(shards_in(cache)) == 3
    release()
    keep()


FETCH = """
import sys, time
from pathlib import Path
from data.storage.cache import ShardCache
from data.shards.manifest import ShardInfo, load_manifest

split, cache, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def slowly(stream):
    stream.write((split / shard.name).read_bytes()[:1000])
    print("begun", flush=True)
    time.sleep(pause)
    stream.write((split / shard.name).read_bytes()[1000:])
    print("fetched", flush=True)

for shard in load_manifest(split).shards[:3]:
    ShardCache(cache, 10**9).bring(shard, slowly)
"""


def start_fetching(packed_digits: Path, cache: Path, pause: float) -> subprocess.Popen:
    return forkserver.popen(
        [sys.executable, "-c", FETCH, str(packed_digits / "train"), str(cache), str(pause)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_share_what_one_of_them_fetches(packed_digits: Path, cache: Path) -> None:
    processes = [start_fetching(packed_digits, cache, 0.3) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sum(text.count("fetched") for text in said) == 3
    for shard in load_manifest(packed_digits / "train").shards[:3]:
        stored = (cache / f"{shard.sha256}.tar").read_bytes()
        assert stored == (packed_digits / "train" / shard.name).read_bytes()


def test_a_killed_fetch_leaves_nothing_that_hurts(packed_digits: Path, cache: Path) -> None:
    process = start_fetching(packed_digits, cache, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    (part,) = cache.glob("*.part")
    # Not while it is being written.
    assert ShardCache(cache, 10**9).clean() == 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    shard = load_manifest(packed_digits / "train").shards[0]
    content = (packed_digits / "train" / shard.name).read_bytes()
    other = ShardCache(cache, 10**9)
    assert part.exists()
    release = other.bring(shard, lambda stream: stream.write(content))
    assert other.path(shard).read_bytes() == content
    assert release is not None
    release()
    part.write_bytes(content[:100])
    assert other.clean() == 1
    assert not part.exists()


def test_a_cache_that_cannot_be_made_is_refused(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir .*file/cache cannot be made"):
        open_split(config(server.url, tmp_path / "file" / "cache"), "train")
