"""The memory that workers and the main process share for batches."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.stream.batch_memory import BatchMemory
from data.stream.pipeline import DataConfig, open_split, train_stream
from data.stream.plan import BatchPlan
from tests import forkserver

ROOT = Path(__file__).parents[3]


class Counting:
    """A batch is `[image]` of its number, four bytes."""

    def load(
        self, keys: list[Any], room: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], bool]:
        image = torch.full((1, 1, 2, 2), keys[0], dtype=torch.uint8)
        if room is None or len(room) < 4:
            return {"image": image}, False
        return {"image": room[:4].view(1, 1, 2, 2).copy_(image)}, True


def through(memory: BatchMemory, numbers: range) -> Iterator[dict[str, torch.Tensor]]:
    slotted = memory.dataset(Counting())
    loaded = (slotted.__getitems__(task) for task in memory.tasks([n] for n in numbers))
    return memory.batches(loaded)


def test_a_slot_is_free_once_the_last_view_of_its_images_is_gone() -> None:
    stream = through(BatchMemory(slots=1, slot_bytes=4), range(9))
    first = next(stream)["image"]
    corner, place = first[0, 0, 1:, 1:], first.data_ptr()
    del first
    second = next(stream)["image"]
    assert second.data_ptr() != place
    assert corner.item() == 0
    del corner
    gc.collect()
    third = next(stream)["image"]
    assert third.data_ptr() == place
    assert third.unique().item() == 2


def test_what_does_not_fit_gets_memory_of_its_own() -> None:
    batches = list(through(BatchMemory(slots=2, slot_bytes=3), range(5)))
    assert [int(batch["image"][0, 0, 0, 0]) for batch in batches] == [0, 1, 2, 3, 4]


def stream(folder: Path, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    config = DataConfig(
        path=folder, image_size=8, eval_crop_ratio=1.0, augment="crop", workers=workers
    )
    train = open_split(config, "train")
    return train_stream(train, BatchPlan(train.shard_sizes, 3, 96), config, epochs=1)


def test_batches_that_are_kept_are_not_overwritten(packed_digits: Path) -> None:
    kept, alone = list(stream(packed_digits, 2)), list(stream(packed_digits, 0))
    # More than the slots of two workers, each two batches ahead.
    assert len(kept) == len(alone) == 1437 // 96
    for ours, theirs in zip(kept, alone, strict=True):
        assert torch.equal(ours["id"], theirs["id"])
        assert torch.equal(ours["image"], theirs["image"])
    assert len({batch["image"].data_ptr() for batch in kept}) == len(kept)


def test_workers_use_memory_again_once_a_batch_is_gone(packed_digits: Path) -> None:
    places = [batch["image"].data_ptr() for batch in stream(packed_digits, 1)]
    assert len(places) == 1437 // 96
    assert len(set(places)) <= 4


_RAISES = """
import sys
from pathlib import Path
from tests.data.stream.test_batch_memory import stream

def main():
    batches = stream(Path(sys.argv[1]), 1)
    next(batches)
    raise ValueError("of the user's own")

if __name__ == "__main__":
    main()
"""


def test_an_exception_of_the_users_own_ends_the_process_and_its_workers(
    packed_digits: Path, tmp_path: Path
) -> None:
    script = tmp_path / "raises.py"
    script.write_text(_RAISES)
    ended = forkserver.run(
        [sys.executable, str(script), str(packed_digits)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert b"of the user's own" in ended.stderr
