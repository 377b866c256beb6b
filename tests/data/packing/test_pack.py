"""Packing: same bytes always, resumable after a kill."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset

from data.errors import DataError
from data.packing.encoding import Encoding
from data.packing.pack import default_shard_samples, pack
from data.shards.index import SampleIndex
from data.shards.manifest import load_manifest, verify_checksums, verify_shards
from data.sources.digits import digits
from data.sources.image_folder import imagefolder
from data.sources.source import ArrayReader
from tests import forkserver

ROOT = Path(__file__).parents[3]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_digits_pack_whole(packed_digits: Path) -> None:
    train = load_manifest(packed_digits / "train")
    val = load_manifest(packed_digits / "val")
    assert (train.samples, val.samples) == (1437, 360)
    assert len(train.shards) >= 8
    assert verify_checksums(packed_digits / "train", train, progress=False) == []
    assert train.source["kind"] == "digits"
    assert train.source["seed"] == 0


def test_packed_samples_are_those_of_the_source(packed_digits: Path) -> None:
    index = SampleIndex.load(packed_digits / "train" / "index.npz")
    labels = digits().splits["train"].labels
    assert np.array_equal(np.bincount(index.label), np.bincount(labels))
    # Shuffled: neighbours are no likelier to agree than chance (about 0.1).
    assert (index.label[1:] == index.label[:-1]).mean() < 0.15
    assert not np.array_equal(index.label, labels)


def test_statistics_are_those_of_train_for_both(packed_digits: Path) -> None:
    reader = digits().splits["train"]
    assert isinstance(reader, ArrayReader)
    pixels = reader.images / 255
    stats = load_manifest(packed_digits / "train").image
    assert stats.measured_on == 1437
    assert np.allclose([stats.mean[0], stats.std[0]], [pixels.mean(), pixels.std()], atol=1e-5)
    assert load_manifest(packed_digits / "val").image == stats


def test_plain_webdataset_reads_the_shards(packed_digits: Path) -> None:
    shards = sorted(str(path) for path in (packed_digits / "val").glob("*.tar"))
    opened: Any = WebDataset(shards, shardshuffle=False)
    samples = list(opened.decode("pil").to_tuple("png", "cls"))
    index = SampleIndex.load(packed_digits / "val" / "index.npz")
    assert [label for _, label in samples] == index.label.tolist()
    assert {image.size for image, _ in samples} == {(8, 8)}


def test_parallel_and_repeated_packings_are_byte_equal(packed_digits: Path, tmp_path: Path) -> None:
    pack(digits(), tmp_path / "two", workers=2, progress=False)
    assert contents(tmp_path / "two") == contents(packed_digits)


def test_seed_changes_the_order_but_not_the_split(packed_digits: Path, tmp_path: Path) -> None:
    other = pack(digits(), tmp_path, seed=1, progress=False)
    mine = SampleIndex.load(tmp_path / "val" / "index.npz").label
    theirs = SampleIndex.load(packed_digits / "val" / "index.npz").label
    assert not np.array_equal(mine, theirs)
    assert np.array_equal(np.sort(mine), np.sort(theirs))
    assert other["val"].samples == 360


def test_packing_again_is_a_noop_that_says_so(packed_digits: Path, tmp_path: Path, caplog) -> None:
    out = shutil.copytree(packed_digits, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with caplog.at_level(logging.INFO, "data"):
        manifests = pack(digits(), out, progress=False)
    assert "complete: nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert manifests["train"] == load_manifest(out / "train")


def test_damaged_packing_is_repaired(packed_digits: Path, tmp_path: Path) -> None:
    out = shutil.copytree(packed_digits, tmp_path / "copy")
    (out / "train" / "shard-000002.tar").unlink()
    with (out / "val" / "shard-000001.tar").open("r+b") as stream:
        stream.truncate(3000)
    pack(digits(), out, progress=False)
    assert contents(out) == contents(packed_digits)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"shard_samples": 50}, "shard_samples: not given there, 50 now"),
        ({"encoding": Encoding(max_side=5)}, "max_side: not given there, 5 now, quality: not"),
    ],
)
def test_another_packing_is_refused(packed_digits: Path, change: dict, named: str) -> None:
    before = contents(packed_digits)
    with pytest.raises(DataError, match=rf"another packing \({named}.*\); remove it or choose"):
        pack(digits(), packed_digits, progress=False, **change)
    assert contents(packed_digits) == before


def test_folders_of_others_are_refused(tmp_path: Path, make_folder, make_tar) -> None:
    make_tar(tmp_path / "out" / "train" / "000.tar", [("a.jpg", b""), ("a.cls", b"0")])
    with pytest.raises(DataError, match=r"train holds shards that were not packed here; remove"):
        pack(imagefolder(make_folder({"train/a": 1})), tmp_path / "out", progress=False)
    (tmp_path / "out" / "packing.json").write_text("[]")
    with pytest.raises(DataError, match=r"another packing \(kind: not given there, digits now; "):
        pack(digits(), tmp_path / "out", progress=False)


def test_two_packings_at_once_are_refused(packed_digits: Path, tmp_path: Path) -> None:
    out = shutil.copytree(packed_digits, tmp_path / "copy")
    with (out / "packing.json").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is packing into"):
            pack(digits(), out, progress=False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shard_samples": 0}, "shard_samples is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        pack(digits(), tmp_path, progress=False, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_undecodable_file_ends_the_packing_by_name(
    tmp_path: Path, make_folder, workers: int
) -> None:
    root = make_folder({"train/a": 9})
    (root / "train/a/a.4.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.4\.png is not an image that can be decoded"):
        pack(imagefolder(root), tmp_path / "out", shard_samples=3, workers=workers, progress=False)
    assert not (tmp_path / "out/train/manifest.json").exists()
    assert not list((tmp_path / "out/train").glob(".tmp-*"))


def test_shard_sizes() -> None:
    assert default_shard_samples(1437) == 89
    assert default_shard_samples(10) == 64
    assert default_shard_samples(1_281_167) == 5000


KILLED = """
import os, signal, sys
from pathlib import Path
from data.packing.pack import pack
from data.sources.digits import digits
from data.sources.source import ArrayReader
written = 0
read = ArrayReader.read
def read_then_die(self, i):
    global written
    written += 1
    if written == 700:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, i)
ArrayReader.read = read_then_die
pack(digits(), Path(sys.argv[1]), progress=False)
"""


def test_killed_in_mid_shard_and_resumed(packed_digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = forkserver.run([sys.executable, "-c", KILLED, str(out)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    shards = sorted((out / "train").glob("shard-*.tar"))
    assert len(shards) == 699 // 85
    assert list((out / "train").glob(".tmp-*")), "it was to be killed in the middle of a shard"
    with pytest.raises(DataError, match="no manifest"):
        load_manifest(out / "train")
    kept = {path: path.stat().st_mtime_ns for path in shards}
    pack(digits(), out, progress=False)
    assert {path: path.stat().st_mtime_ns for path in shards} == kept, "whole shards are kept"
    assert contents(out) == contents(packed_digits)


PARALLEL = """
import sys
from pathlib import Path
from data.packing.pack import pack
from data.sources.image_folder import imagefolder
if __name__ == "__main__":
    pack(imagefolder(Path(sys.argv[1])), Path(sys.argv[2]), shard_samples=1, workers=2)
"""


def test_killed_parallel_packing_leaves_no_process_behind(tmp_path: Path, make_folder) -> None:
    root, out = make_folder({"train/a": 600}), tmp_path / "out"
    script = tmp_path / "pack_it.py"
    script.write_text(PARALLEL)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = forkserver.popen(
        [sys.executable, str(script), str(root), str(out)], env=env, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("train/shard-*.tar"))) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    children = _children(process.pid)
    assert len(children) >= 2
    process.kill()
    process.wait()
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline, "packing processes outlive their parent"
        time.sleep(0.05)
    resumed = pack(imagefolder(root), out, shard_samples=1, progress=False)
    verify_shards(out / "train", resumed["train"])
    assert resumed["train"].samples == 600


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_mixed_grey_and_colour_counts_as_colour(tmp_path: Path, image_bytes) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(image_bytes(0, mode="L"))
    (folder / "1.png").write_bytes(image_bytes(1, mode="L"))
    assert pack(imagefolder(tmp_path), tmp_path / "g", progress=False)["train"].image.channels == 1
    (folder / "2.png").write_bytes(image_bytes(2))
    stats = pack(imagefolder(tmp_path), tmp_path / "c", progress=False)["train"].image
    assert (stats.channels, stats.measured_on) == (3, 3)
