"""The processes of data workers: what their server has imported for all of them."""

from __future__ import annotations

import importlib.util
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from data.augmentation.transforms import modules_for
from data.config import DataConfig
from data.stream import loader
from data.stream.pipeline import open_split
from tests.data.stream.worker_modules import Witness, write_imported

ALL = {"augment": "imagenet", "randaugment": "rand-m9-n1", "mixup": 0.2, "cutmix": 1.0}


@pytest.mark.parametrize(
    "name", [*loader.PRELOADED, *modules_for(DataConfig(path=Path(), image_size=8, **ALL))]
)
def test_what_is_preloaded_can_be_found(name: str) -> None:
    """multiprocessing says nothing of a name that it cannot import."""
    assert importlib.util.find_spec(name) is not None


def test_a_worker_imports_nothing_of_weight(packed_digits: Path, tmp_path: Path) -> None:
    config = DataConfig(path=packed_digits, image_size=8, augment="crop", hflip=True)
    dataset: Any = Witness(open_split(config, "train"))
    ((batch, after),) = loader.load(dataset, [[(0, 1), (0, 2)]], workers=1, prefetch=1)
    assert len(batch["image"]) == 2
    new = multiprocessing.get_context("forkserver").Process(
        target=write_imported, args=(tmp_path / "modules",)
    )
    new.start()
    new.join(60)
    before = (tmp_path / "modules").read_text().split("\n")
    assert sorted(set(after) - set(before)) == []
    assert not {"torchvision", "timm", "scipy"} & {name.partition(".")[0] for name in after}
