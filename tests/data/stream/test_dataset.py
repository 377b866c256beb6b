"""What a data set says of itself before training on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.packing.adopt import index_shards
from data.stream import plan as plan_module
from data.stream.pipeline import open_split
from tests.data.conftest import MakeTar, image_bytes


def test_a_set_sorted_by_class_is_warned_of_where_a_window_cannot_mix_it(
    tmp_path: Path,
    make_tar: MakeTar,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    image = image_bytes(0)
    labels = np.repeat(np.arange(10), 4)
    for name, order in {
        "sorted": labels,
        "shuffled": np.random.default_rng(0).permutation(labels),
    }.items():
        members = [
            member
            for k, label in enumerate(order.tolist())
            for member in ((f"{k}.png", image), (f"{k}.cls", str(label).encode()))
        ]
        make_tar(tmp_path / name / "train" / "a.tar", members)
        index_shards(tmp_path / name / "train", progress=False)
    by_class, mixed = (
        open_split(DataConfig(path=tmp_path / name, image_size=8), "train")
        for name in ("sorted", "shuffled")
    )
    by_class.warn_if_sorted()
    monkeypatch.setattr(plan_module, "WINDOW", 30)
    mixed.warn_if_sorted()
    assert not caplog.records
    by_class.warn_if_sorted()
    assert f"{tmp_path / 'sorted' / 'train'} is sorted by class" in caplog.text
