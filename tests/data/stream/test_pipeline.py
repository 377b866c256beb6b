"""Streams of batches: exact, repeatable, and honest about what is corrupt."""

from __future__ import annotations

import importlib
import io
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from data.augmentation.transforms import sample_seed, seeded
from data.errors import DataError
from data.packing.pack import pack
from data.shards.index import SampleIndex
from data.shards.manifest import load_manifest
from data.sources.image_folder import imagefolder
from data.storage import reader as reader_module
from data.stream.loader import load
from data.stream.pipeline import DataConfig, eval_stream, normalise, open_split, train_stream
from data.stream.plan import BatchPlan
from tests import forkserver

ROOT = Path(__file__).parents[3]
Batches = list[dict[str, torch.Tensor]]


def config(path: Path, **options: Any) -> DataConfig:
    return DataConfig(**{"path": path, "image_size": 8, "eval_crop_ratio": 1.0} | options)


def train(cfg: DataConfig, batch: int = 256, seed: int = 3, **options: Any) -> Batches:
    dataset = open_split(cfg, "train")
    world = {
        key: options.pop(key) for key in ("world_size", "rank", "accumulation") & options.keys()
    }
    plan = BatchPlan(dataset.shard_sizes, seed, batch, **world)
    return list(train_stream(dataset, plan, cfg, **{"epochs": 1} | options))


def same(a: Batches, b: Batches) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
        for x, y in zip(a, b, strict=True)
    )


def test_batches_hold_what_was_packed(packed_digits: Path) -> None:
    batches = train(config(packed_digits))
    assert len(batches) == 1437 // 256
    first = batches[0]
    assert first["image"].dtype == torch.uint8
    assert first["image"].shape == (256, 1, 8, 8)
    assert all(first[key].dtype == torch.int64 for key in ("label", "id", "corrupt"))
    index = SampleIndex.load(packed_digits / "train" / "index.npz")
    manifest = load_manifest(packed_digits / "train")
    for batch in batches:
        ids = batch["id"].tolist()
        assert batch["label"].tolist() == index.label[ids].tolist()
        assert not batch["corrupt"].any()
    sample = int(first["id"][5])
    with (packed_digits / "train" / manifest.shards[index.shard[sample]].name).open("rb") as tar:
        tar.seek(int(index.offset[sample]))
        stored = Image.open(io.BytesIO(tar.read(int(index.size[sample]))))
        assert np.array_equal(np.asarray(stored), first["image"][5, 0].numpy())


def test_workers_change_nothing(packed_digits: Path) -> None:
    cfg = config(packed_digits, augment="crop", hflip=True, crop_padding=2)
    alone = train(cfg, epochs=2, accumulation=2)
    assert len(alone) == 2 * 5 * 2
    assert same(alone, train(cfg.model_copy(update={"workers": 2}), epochs=2, accumulation=2))
    evaluated = list(eval_stream(open_split(cfg, "val"), cfg))
    cfg = config(packed_digits, augment="crop", hflip=True, workers=2)
    assert same(evaluated, list(eval_stream(open_split(cfg, "val"), cfg)))


def test_seeking_equals_replaying(packed_digits: Path) -> None:
    cfg = config(packed_digits, augment="crop")
    whole = train(cfg, epochs=3)
    assert same(whole[5 + 2 :], train(cfg, epochs=3, start_epoch=1, start_step=2))


def test_two_ranks_read_what_one_does(packed_digits: Path) -> None:
    cfg = config(packed_digits, augment="crop", hflip=True)
    single = train(cfg)
    ranks = [train(cfg, world_size=2, rank=rank) for rank in (0, 1)]
    joined = [
        {key: torch.cat([left[key], right[key]]) for key in left}
        for left, right in zip(*ranks, strict=True)
    ]
    assert same(single, joined)


def test_augmentation_belongs_to_seed_epoch_and_sample(packed_digits: Path) -> None:
    cfg = config(packed_digits, augment="crop", hflip=True)
    dataset = open_split(cfg, "train").with_seed(1)
    item = dataset[4, 17]["image"]
    assert torch.equal(item, dataset[4, 17]["image"])
    others = [dataset[epoch, 17]["image"] for epoch in range(5, 15)]
    assert sum(torch.equal(item, other) for other in others) < 5
    reseeded = [dataset.with_seed(seed)[4, 17]["image"] for seed in range(2, 12)]
    assert sum(torch.equal(item, other) for other in reseeded) < 5
    assert torch.equal(dataset[17]["image"], dataset.with_seed(2)[17]["image"])
    assert len({sample_seed(*key) for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0)]}) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_state_is_left_alone(packed_digits: Path, workers: int) -> None:
    cfg = config(packed_digits, augment="crop", hflip=True, workers=workers)
    before = (torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state()))
    assert train(cfg)
    assert list(eval_stream(open_split(cfg, "val"), cfg))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), pickle.dumps(np.random.get_state()))


def test_seeded_block_restores_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(1):
        torch.rand(1)
        raise KeyError
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("batch_size", [256, 100, 7])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_counts_each_sample_once(
    packed_digits: Path, world: int, batch_size: int
) -> None:
    cfg = config(packed_digits, eval_batch_size=batch_size)
    dataset = open_split(cfg, "val")
    ranks = [list(eval_stream(dataset, cfg, world, rank)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {batch["valid"].dtype for batches in ranks for batch in batches} == {torch.bool}
    assert len({batch["image"].shape for batches in ranks for batch in batches}) == 1
    ids = torch.cat([batch["id"][batch["valid"]] for batches in ranks for batch in batches])
    assert torch.equal(ids.sort().values, torch.arange(360))


def damage(folder: Path, samples: list[int]) -> list[str]:
    index = SampleIndex.load(folder / "index.npz")
    manifest = load_manifest(folder)
    for sample in samples:
        with (folder / manifest.shards[index.shard[sample]].name).open("r+b") as stream:
            start, size = int(index.offset[sample]), int(index.size[sample])
            stream.seek(start + size // 2)
            content = stream.read(size - size // 2)
            stream.seek(start + size // 2)
            stream.write(bytes(byte ^ 0xFF for byte in content))
    return [manifest.shards[index.shard[sample]].name for sample in samples]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_samples_are_replaced_counted_and_logged_once(
    packed_digits: Path, tmp_path: Path, caplog, workers: int
) -> None:
    shutil.copytree(packed_digits, tmp_path / "set")
    shards = damage(tmp_path / "set" / "train", [40, 41, 1436])
    cfg = config(tmp_path / "set", workers=workers)
    dataset = open_split(cfg, "train")
    plan = BatchPlan(dataset.shard_sizes, 0, 1437)
    with caplog.at_level(logging.WARNING, "data"):
        epochs = list(train_stream(dataset, plan, cfg, epochs=2))
    intact = open_split(config(packed_digits), "train")
    for batch in epochs:
        where = {sample: k for k, sample in enumerate(batch["id"].tolist())}
        assert len(where) == 1437
        corrupt = batch["corrupt"].nonzero().flatten().tolist()
        assert sorted(batch["id"][corrupt].tolist()) == [40, 41, 1436]
        # The last of all is followed by the first of its shard.
        first = 1437 - dataset.shard_sizes[-1]
        for sample, substitute in {40: 42, 41: 42, 1436: first}.items():
            assert torch.equal(batch["image"][where[sample]], intact[substitute]["image"])
            assert batch["label"][where[sample]] == intact[substitute]["label"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert {line.split()[2] for line in lines} == {"00000040", "00000041", "00001436"}
    assert all(any(shard in line for shard in shards) for line in lines)
    assert dataset.corrupt.keys() == {40, 41, 1436}
    assert sum(dataset.corrupt_per_shard().values()) == 3
    assert dataset.corrupt_per_shard()[shards[0]] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_shard_ends_the_stream_with_a_sentence(
    packed_digits: Path, tmp_path: Path, workers: int
) -> None:
    shutil.copytree(packed_digits, tmp_path / "set")
    damage(tmp_path / "set" / "val", list(range(10, 50)))
    cfg = config(tmp_path / "set", workers=workers)
    with pytest.raises(DataError, match=r"^32 samples in a row cannot .* from 00000010 in .*tar"):
        list(eval_stream(open_split(cfg, "val"), cfg))


def test_a_shard_that_shrinks_after_the_start_is_corrupt_not_silent(
    packed_digits: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed_digits, tmp_path / "set") / "val"
    cfg = config(tmp_path / "set")
    dataset = open_split(cfg, "val")
    last = folder / dataset.manifest.shards[-1].name
    with last.open("r+b") as stream:
        stream.truncate(int(SampleIndex.load(folder / "index.npz").offset[-1]) + 10)
    (*_, batch) = eval_stream(dataset, cfg)
    assert batch["id"][batch["corrupt"] == 1].unique().tolist() == [359]
    assert "ends after 10 of its" in dataset.corrupt[359]
    last.unlink()
    with pytest.raises(DataError, match=r"shard-000005.tar cannot be read \(No such file"):
        list(eval_stream(dataset.with_seed(1), cfg))


def test_start_checks_the_shards(packed_digits: Path, tmp_path: Path) -> None:
    shutil.copytree(packed_digits, tmp_path / "set")
    (tmp_path / "set" / "val" / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000000.tar is missing"):
        open_split(config(tmp_path / "set"), "val")
    open_split(config(tmp_path / "set"), "train")
    with pytest.raises(DataError, match="there is no folder"):
        open_split(config(tmp_path / "set"), "test")


def test_plan_of_other_shards_is_refused(packed_digits: Path) -> None:
    cfg = config(packed_digits)
    with pytest.raises(
        DataError, match=r"plan is for 100 samples in 1 shards, but .*train has 1437"
    ):
        train_stream(open_split(cfg, "train"), BatchPlan([100], 0, 10), cfg, epochs=1)


def test_reader_keeps_few_files_open_and_survives_pickling(
    packed_digits: Path, monkeypatch
) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN", 2)
    dataset = open_split(config(packed_digits), "train")
    expected = [dataset[sample]["label"] for sample in range(0, 1437, 50)]
    assert len(dataset._reader._open) == 2
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy._reader._open) == 0
    assert [copy[sample]["label"] for sample in range(0, 1437, 50)] == expected
    before = len(list(Path("/proc/self/fd").iterdir()))
    del copy, dataset
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 4


MISBEHAVING = """
import os, signal, time
from torch.utils.data import Dataset

class Misbehaving(Dataset):
    def __getitem__(self, key):
        if key == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if key == "hang":
            time.sleep(600)
        if key == "slow":
            time.sleep(5)
        if key == "bug":
            raise RuntimeError("a bug of ours")
        return 1
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Callable[..., list[Any]]:
    """Load keys with one worker; the dataset lies where the worker can import it from."""
    (tmp_path / "misbehaving.py").write_text(MISBEHAVING)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("misbehaving", None)
    dataset = importlib.import_module("misbehaving").Misbehaving()

    def load_keys(keys: list[str], stuck_seconds: float = 60) -> list[Any]:
        batches = ([key] for key in keys)
        return list(load(dataset, batches, workers=1, prefetch=1, stuck_seconds=stuck_seconds))

    return load_keys


def test_a_dead_worker_raises_soon(run) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=r"data worker \d+ died \(exit code -9"):
        run(["fine", "die"])
    assert time.monotonic() - started < 20


def test_a_hanging_worker_raises_and_is_removed(run) -> None:
    with pytest.raises(DataError, match=r"no batch came from 1 data workers for 3 s"):
        run(["fine", "hang"], stuck_seconds=3)
    deadline = time.monotonic() + 10
    while multiprocessing.active_children():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_slow_batch_is_waited_for_and_errors_keep_their_kind(run) -> None:
    assert len(run(["fine", "slow", "fine"])) == 3
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run(["bug"])


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from data.stream.pipeline import DataConfig, open_split, train_stream
from data.stream.plan import BatchPlan

def main():
    got = []
    for name in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(name, lambda number, frame: got.append(number))
    cfg = DataConfig(path=Path(sys.argv[1]), image_size=8, workers=2)
    dataset = open_split(cfg, "train")
    stream = train_stream(dataset, BatchPlan(dataset.shard_sizes, 0, 64), cfg, epochs=20)
    for step, batch in enumerate(stream):
        if step in (5, 30):
            os.killpg(0, signal.SIGUSR1)
            os.killpg(0, signal.SIGTERM)
    assert len(got) == 4, got
    assert step == 20 * 22 - 1, step

if __name__ == "__main__":
    main()
"""


def test_signals_to_the_whole_group_leave_workers_alive(
    packed_digits: Path, tmp_path: Path
) -> None:
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    done = forkserver.run(
        [sys.executable, str(script), str(packed_digits)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


KILLED = """
import os, signal, sys
from pathlib import Path
from data.stream.pipeline import DataConfig, open_split, train_stream
from data.stream.plan import BatchPlan

if __name__ == "__main__":
    cfg = DataConfig(path=Path(sys.argv[1]), image_size=8, workers=2)
    dataset = open_split(cfg, "train")
    plan = BatchPlan(dataset.shard_sizes, 0, 64)
    next(stream := train_stream(dataset, plan, cfg, epochs=20))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_leaves_no_process(packed_digits: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    # Whoever is below it holds the pipe open: its end is that of the last process.
    done = forkserver.run(
        [sys.executable, str(script), str(packed_digits)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


def test_abandoned_stream_leaves_no_worker(packed_digits: Path) -> None:
    cfg = config(packed_digits, workers=2)
    dataset = open_split(cfg, "train")
    stream = train_stream(dataset, BatchPlan(dataset.shard_sizes, 0, 64), cfg, epochs=1000)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    del stream
    deadline = time.monotonic() + 15
    while multiprocessing.active_children():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_jpegs_of_all_sizes_make_batches(tmp_path: Path, make_folder) -> None:
    pack(imagefolder(make_folder({"train/a": 7, "train/b": 7})), tmp_path / "set", progress=False)
    cfg = DataConfig(path=tmp_path / "set", image_size=16, augment="imagenet", hflip=True)
    (batch,) = train(cfg, batch=14)
    assert batch["image"].shape == (14, 3, 16, 16)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert sorted(batch["label"].tolist()) == [0] * 7 + [1] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalise(packed_digits: Path, dtype: torch.dtype) -> None:
    stats = load_manifest(packed_digits / "train").image
    (batch,) = train(config(packed_digits), batch=1437)
    pixels = normalise(batch["image"], stats, dtype=dtype)
    assert pixels.dtype == dtype
    expected = (batch["image"].double() / 255 - stats.mean[0]) / stats.std[0]
    assert torch.allclose(pixels.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.02)
    assert abs(expected.mean()) < 1e-4
    assert abs(expected.std() - 1) < 1e-3
    assert batch["image"].dtype == torch.uint8


def test_normalise_sentences_and_constant_channels(packed_digits: Path) -> None:
    stats = load_manifest(packed_digits / "train").image
    with pytest.raises(DataError, match=r"images with 3 channels .* statistics for 1"):
        normalise(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), stats)
    constant = stats.model_copy(update={"mean": [0.0], "std": [0.0]})
    assert not normalise(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), constant).any()


@pytest.mark.parametrize(
    "bad",
    [
        {"image_size": 0},
        {"augment": "mixup"},
        {"eval_crop_ratio": 1.5},
        {"workers": -1},
        {"prefetch": 0},
        {"surprise": 1},
        {"max_corrupt_fraction": 2},
    ],
)
def test_config_refuses_nonsense(bad: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        config(Path(), **bad)


def test_config_describes_every_field() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())
