"""A reader that acknowledges each batch durably, and the process that kills it 20 times.

    python -m tests.data.killed_reader SHARDS FOLDER

It forks the readers, so that torch is imported once and not 20 times; itself it must have run
nothing of torch, whose threads do not survive a fork. Leaves FOLDER/killed, what readers have
acknowledged from kill to kill, and FOLDER/whole, the same without kills.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from data.config import DataConfig
from data.stream import plan as plan_module
from data.stream.pipeline import open_split, train_stream
from data.stream.plan import BatchPlan

KILLS = [0] * 17 + [2] * 3  # the workers of each reader
SEED, BATCH, EPOCHS, WINDOW = 5, 48, 3, 500


def config(shards: Path, workers: int) -> DataConfig:
    return DataConfig(
        path=shards, image_size=8, eval_crop_ratio=1.0, augment="crop", workers=workers
    )


def acknowledged(log: Path) -> list[list[int]]:
    """What is durable: whole lines; a kill may have torn the last one."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return [json.loads(line) for line in lines]


def read_on(shards: Path, log: Path, workers: int) -> None:
    """Read from the acknowledged position to the end; acknowledge each batch durably."""
    cfg = config(shards, workers)
    dataset = open_split(cfg, "train")
    plan = BatchPlan(dataset.shard_sizes, SEED, BATCH)
    done = acknowledged(log)
    with log.open("r+b" if log.exists() else "w+b") as stream:
        stream.seek(sum(len(json.dumps(line)) + 1 for line in done))
        stream.truncate()
        epoch, step = divmod(len(done), plan.steps_per_epoch)
        batches = train_stream(
            dataset, plan, cfg, start_epoch=epoch, start_step=step, epochs=EPOCHS
        )
        for number, batch in enumerate(batches, start=len(done)):
            line = [
                number // plan.steps_per_epoch,
                int(batch["image"].sum()),
                *batch["id"].tolist(),
            ]
            stream.write(json.dumps(line).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def wait_for(log: Path, lines: int, process: BaseProcess) -> None:
    deadline = time.monotonic() + 100
    while process.is_alive() and len(acknowledged(log)) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def main(shards: Path, folder: Path) -> None:
    plan_module.WINDOW = WINDOW
    fork = multiprocessing.get_context("fork")
    log, rng = folder / "killed", random.Random(0)
    kills = rng.sample(KILLS, len(KILLS))
    dataset = open_split(config(shards, 0), "train")
    total = EPOCHS * BatchPlan(dataset.shard_sizes, SEED, BATCH).steps_per_epoch
    positions = sorted(rng.sample(range(1, total - 8), len(kills)))
    for position, workers in zip(positions, kills, strict=True):
        process = fork.Process(target=read_on, args=(shards, log, workers))
        process.start()
        wait_for(log, position, process)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        print("killed after", len(acknowledged(log)), flush=True)
    for name in ("killed", "whole"):
        last = fork.Process(target=read_on, args=(shards, folder / name, 0))
        last.start()
        last.join(100)
        assert last.exitcode == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
