"""ImageNet from its tars, in miniature: the same labels as torchvision's, the same bytes always."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets.imagenet as torchvision_imagenet

from data.errors import DataError
from data.images.decode import decode
from data.packing.claim import check_kind
from data.packing.encoding import Encoding
from data.packing.pack import pack
from data.shards.index import SampleIndex
from data.shards.manifest import Manifest, load_manifest, verify_checksums
from data.sources.digits import digits
from data.sources.ilsvrc import find_files, imagenet
from data.sources.image_folder import imagefolder
from data.sources.source import Source
from tests import forkserver
from tests.data.imagenet import DEVKIT_ROOT, MiniImageNet, tar_of, write_imagenet

ROOT = Path(__file__).parents[3]
SHARD = 12


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> MiniImageNet:
    """Six classes; tests must not write here."""
    return write_imagenet(tmp_path_factory.mktemp("ilsvrc"))


@pytest.fixture(scope="module")
def packed(mini: MiniImageNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    pack(source_of(mini.folder, out), out, shard_samples=SHARD, progress=False)
    return out


def source_of(folder: Path, scans: Path, **named: Path) -> Source:
    return imagenet(find_files(folder, **named), scans, progress=False)


def contents(out: Path) -> dict[str, bytes]:
    """All that a packing writes but what holds the times of files."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.endswith((".members.npz", "origin.npz"))
    }


def samples(folder: Path) -> list[tuple[int, bytes]]:
    manifest = load_manifest(folder)
    index = SampleIndex.load(folder / "index.npz")
    shards = [(folder / shard.name).read_bytes() for shard in manifest.shards]
    return [
        (int(label), shards[shard][first : first + size])
        for shard, first, size, label in zip(
            index.shard, index.offset, index.size, index.label, strict=True
        )
    ]


def test_every_image_is_packed_untouched_under_its_class(mini: MiniImageNet, packed: Path) -> None:
    for split, images in (("train", mini.train), ("val", mini.val)):
        wanted = [(mini.classes.index(wnid), content) for wnid, content in images.values()]
        assert sorted(samples(packed / split)) == sorted(wanted)
        manifest = load_manifest(packed / split)
        assert manifest.classes == sorted(mini.classes)
        assert verify_checksums(packed / split, manifest, progress=False) == []
    assert load_manifest(packed / "val").names[:2] == [
        "tench, Tinca tinca",
        "goldfish, Carassius auratus",
    ]


@pytest.fixture(scope="module")
def extracted(mini: MiniImageNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torchvision makes of the same files: it knows them by their checksums alone."""
    root = tmp_path_factory.mktemp("torchvision")
    known = dict(torchvision_imagenet.ARCHIVE_META)
    with pytest.MonkeyPatch.context() as patch:
        for part, (name, _) in known.items():
            shutil.copy(mini.folder / name, root / name)
            checksum = hashlib.md5((root / name).read_bytes()).hexdigest()
            patch.setitem(torchvision_imagenet.ARCHIVE_META, part, (name, checksum))
        for split in ("train", "val"):
            torchvision_imagenet.ImageNet(root, split)
    for name, _ in known.values():
        (root / name).unlink()
    return root


def test_labels_are_those_of_torchvision(extracted: Path, packed: Path) -> None:
    for split in ("train", "val"):
        theirs = torchvision_imagenet.ImageNet(extracted, split)
        wanted = [(label, Path(path).read_bytes()) for path, label in theirs.imgs]
        assert sorted(samples(packed / split)) == sorted(wanted)
        ours = load_manifest(packed / split)
        assert ours.classes == theirs.wnids
        assert ours.names == [", ".join(names) for names in theirs.classes]


def test_extracted_folders_give_the_same_bytes(extracted: Path, packed: Path, tmp_path) -> None:
    pack(source_of(extracted, tmp_path), tmp_path, shard_samples=SHARD, progress=False)
    assert contents(tmp_path) == contents(packed)
    pack(imagefolder(extracted), tmp_path / "plain", shard_samples=SHARD, progress=False)
    for shard in packed.glob("*/*.tar"):
        plain = tmp_path / "plain" / shard.parent.name / shard.name
        assert plain.read_bytes() == shard.read_bytes()


def test_flat_val_folder_takes_labels_from_a_file(mini: MiniImageNet, packed, tmp_path) -> None:
    (tmp_path / "in/val").mkdir(parents=True)
    for name, (_, content) in mini.val.items():
        (tmp_path / "in/val" / name).write_bytes(content)
    kaggle = [f"{Path(name).stem},{wnid} 85 1 499 272 \n" for name, (wnid, _) in mini.val.items()]
    labels = tmp_path / "in/LOC_val_solution.csv"
    labels.write_text("ImageId,PredictionString\n" + "".join(reversed(kaggle)))
    source = source_of(
        tmp_path / "in", tmp_path, train_tar=mini.folder / "ILSVRC2012_img_train.tar"
    )
    assert source.class_names is None
    pack(source, tmp_path / "out", shard_samples=SHARD, progress=False)
    assert samples(tmp_path / "out/val") == samples(packed / "val")


def test_mapping_file_goes_before_the_devkit(mini: MiniImageNet, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{name} {mini.classes[0]}\n" for name in mini.val))
    source = source_of(mini.folder, tmp_path, val_labels=labels)
    assert set(source.splits["val"].labels.tolist()) == {0}


def test_workers_do_not_change_a_byte(mini: MiniImageNet, packed: Path, tmp_path: Path) -> None:
    pack(source_of(mini.folder, tmp_path), tmp_path, shard_samples=SHARD, workers=2, progress=False)
    assert contents(tmp_path) == contents(packed)


def test_the_scan_is_kept_until_the_tar_changes(mini: MiniImageNet, tmp_path: Path) -> None:
    folder = shutil.copytree(mini.folder, tmp_path / "tars")
    first = source_of(folder, tmp_path)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert sorted(kept) == ["train.members.npz", "val.members.npz"]
    # Headers that cannot be read are not looked at again.
    tar = folder / "ILSVRC2012_img_val.tar"
    status = tar.stat()
    tar.write_bytes(b"\xff" * status.st_size)
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source_of(folder, tmp_path).fingerprint() == first.fingerprint()
    os.utime(tar)
    with pytest.raises(DataError, match=r"val\.tar is not a whole, uncompressed tar"):
        source_of(folder, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")} == kept


def test_oddities_are_called_what_they_are(mini: MiniImageNet, packed: Path) -> None:
    png, cmyk, rotated, grey = [content for _, content in list(mini.train.values())[:4]]
    shards = b"".join(path.read_bytes() for path in sorted(packed.glob("train/*.tar")))
    at = shards.index(png)
    assert shards[at - 512 : at].split(b"\0")[0].endswith(b".png")
    for content in (cmyk, rotated, grey):
        at = shards.index(content)
        assert shards[at - 512 : at].split(b"\0")[0].endswith(b".jpg")
        assert decode(content, 3).mode == "RGB"
    assert load_manifest(packed / "train").image.channels == 3


def test_smaller_images_stay_within_the_limit(mini: MiniImageNet, tmp_path: Path) -> None:
    encoding = Encoding(max_side=60, quality=80)
    source = source_of(mini.folder, tmp_path)
    for out, workers in (("one", 1), ("two", 2)):
        pack(
            source,
            tmp_path / out,
            shard_samples=SHARD,
            encoding=encoding,
            workers=workers,
            progress=False,
        )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    originals = {content for _, content in mini.train.values()}
    within = {content for content in originals if max(decode(content).size) <= 60}
    packed = [content for _, content in samples(tmp_path / "one/train")]
    assert within and within == originals & set(packed)
    assert len(packed) == len(originals) and len(within) < len(originals)
    assert max(max(decode(content).size) for content in packed) == 60
    with pytest.raises(DataError, match=r"another packing \(max_side: 60 there, not given now"):
        pack(source, tmp_path / "one", shard_samples=SHARD, progress=False)


def test_killed_and_started_again(tmp_path: Path) -> None:
    """kill -9 of the command and all its processes, in mid-packing, whenever that is."""
    folder, out = write_imagenet(tmp_path / "tars", per_class=30, val=60).folder, tmp_path / "out"
    command = [sys.executable, "-m", "launcher.cli", "pack", "imagenet", str(folder)]
    command += ["--shard-samples", "4", "--out"]
    begun = forkserver.popen(
        [*command, str(out), "--workers", "2"],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while len(list(out.glob("train/shard-*.tar"))) < 3:
        assert begun.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    # Its workers too: what a living process is writing is not cleared away.
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(begun.pid, 0)
            time.sleep(0.005)
    shards = {path: path.stat().st_mtime_ns for path in out.glob("*/shard-*.tar")}
    kept = shards | {path: path.stat().st_mtime_ns for path in out.glob("*.members.npz")}
    assert len(shards) < 45 and len(kept) == len(shards) + 2
    assert not (out / "train/manifest.json").exists()
    done = forkserver.run(
        [*command, str(out), "--workers", "1"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "180" in done.stdout and str(out / "val/contact_sheet.png") in done.stdout
    forkserver.run([*command, str(tmp_path / "undisturbed")], cwd=ROOT, check=True)
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("cut", [100, 700, 9_000, "member", "end"])
def test_truncated_tars_are_refused(mini: MiniImageNet, tmp_path: Path, cut: int | str) -> None:
    folder = shutil.copytree(mini.folder, tmp_path / "tars")
    tar = folder / "ILSVRC2012_img_train.tar"
    content = tar.read_bytes()
    # At the edge of a class tar the file looks like the start of a whole one.
    edges = {"member": content.index(b"n02100735.tar"), "end": len(content.rstrip(b"\0")) + 100}
    tar.write_bytes(content[: edges[cut] if isinstance(cut, str) else cut])
    with pytest.raises(DataError, match=r"train\.tar is not a whole, uncompressed tar file"):
        source_of(folder, tmp_path)
    assert not list(tmp_path.glob("*.npz"))


def test_damaged_class_tars_are_named(mini: MiniImageNet, tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "t.tar", {"n01440764.tar": b"not a tar" * 200})
    with pytest.raises(DataError, match=r"n01440764\.tar in .*t\.tar is not a whole, uncomp"):
        source_of(mini.folder, tmp_path, train_tar=tar)
    # A header in the middle that is none: tarfile alone would take it for the end.
    content = bytearray((mini.folder / "ILSVRC2012_img_train.tar").read_bytes())
    second = content.index(list(mini.train)[1].encode())
    content[second : second + 512] = b"x" * 512
    tar.write_bytes(content)
    with pytest.raises(DataError, match=r"n02119789\.tar in .* no tar header at byte"):
        source_of(mini.folder, tmp_path, train_tar=tar)
    with pytest.raises(DataError, match=r"holds ILSVRC2012_val_00000001\.JPEG, but only tars of"):
        source_of(mini.folder, tmp_path, train_tar=mini.folder / "ILSVRC2012_img_val.tar")


def _without(mini: MiniImageNet, folder: Path, *names: str) -> Path:
    shutil.copytree(mini.folder, folder)
    for name in names:
        (folder / name).unlink()
    return folder


def test_missing_files_are_named(mini: MiniImageNet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"where is ILSVRC2012_img_val\.tar\? name the folder"):
        find_files(None, train_tar=mini.folder / "ILSVRC2012_img_train.tar")
    with pytest.raises(DataError, match=r"neither ILSVRC2012_img_train\.tar nor train/ in .*--tr"):
        find_files(tmp_path)
    folder = _without(mini, tmp_path / "a", "ILSVRC2012_img_val.tar")
    with pytest.raises(DataError, match=r"neither ILSVRC2012_img_val\.tar nor val/ in .*--val-tar"):
        find_files(folder)
    with pytest.raises(DataError, match=r"there is no file .*gone\.tar"):
        source_of(mini.folder, tmp_path, train_tar=tmp_path / "gone.tar")
    folder = _without(mini, tmp_path / "b", f"{DEVKIT_ROOT}.tar.gz")
    with pytest.raises(DataError, match=r"says nothing of the classes .* --devkit .* --val-labels"):
        source_of(folder, tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ILSVRC2012_val_00000001.JPEG n01440764\n", r"00000002\.JPEG in .* has no label \(of 24"),
        ("ILSVRC2012_val_00000001.JPEG\n", r"line 1 of .* is not a file name and a class"),
        ("\n", r"labels.txt has no labels"),
        (None, r"name classes that train has not \(n99999999\)"),
    ],
)
def test_bad_labels_are_refused(mini: MiniImageNet, tmp_path: Path, text, sentence: str) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text(text or "".join(f"{name} n99999999\n" for name in mini.val))
    with pytest.raises(DataError, match=sentence):
        source_of(mini.folder, tmp_path, val_labels=labels)


def test_bad_devkits_are_refused(mini: MiniImageNet, tmp_path: Path, caplog) -> None:
    devkit = tar_of(tmp_path / "kit.tar.gz", {"data/meta.mat": b"MATLAB 5.0"}, "w:gz")
    with pytest.raises(DataError, match=r"kit\.tar\.gz is not ImageNet's development kit"):
        source_of(mini.folder, tmp_path, devkit=devkit)
    with pytest.raises(DataError, match=r"none\.tar\.gz is not ImageNet's development kit"):
        source_of(mini.folder, tmp_path, devkit=tmp_path / "none.tar.gz")
    smaller = tar_of(tmp_path / "t.tar", {"n01440764.tar": _one_image_tar(mini, tmp_path)})
    with pytest.raises(DataError, match=r"t\.tar lacks 5 of the 6 classes of the devkit"):
        source_of(mini.folder, tmp_path, train_tar=smaller)


def _one_image_tar(mini: MiniImageNet, folder: Path) -> bytes:
    name, (_, content) = next(iter(mini.train.items()))
    return tar_of(folder / "one.tar", {name: content}).read_bytes()


def test_missing_images_are_noticed(tmp_path: Path, caplog) -> None:
    mini = write_imagenet(tmp_path / "a", per_class=3)
    kit = write_imagenet(tmp_path / "b", per_class=4).folder / f"{DEVKIT_ROOT}.tar.gz"
    with caplog.at_level(logging.WARNING, "data"):
        source_of(mini.folder, tmp_path, devkit=kit)
    assert "6 classes of" in caplog.text and "n01440764: 3, not 4" in caplog.text


def test_an_unpacked_devkit_will_do(mini: MiniImageNet, packed: Path, tmp_path: Path) -> None:
    folder = _without(mini, tmp_path / "tars")
    shutil.unpack_archive(folder / f"{DEVKIT_ROOT}.tar.gz", folder, filter="data")
    (folder / f"{DEVKIT_ROOT}.tar.gz").unlink()
    assert source_of(folder, tmp_path).fingerprint() == _fingerprint(packed)


def _fingerprint(out: Path) -> str:
    manifest: Manifest = load_manifest(out / "train")
    return manifest.source["fingerprint"]


def test_undecodable_image_is_named(mini: MiniImageNet, tmp_path: Path) -> None:
    folder = _without(mini, tmp_path / "tars")
    name, (_, content) = list(mini.train.items())[5]
    tar = folder / "ILSVRC2012_img_train.tar"
    tar.write_bytes(tar.read_bytes().replace(content, b"\xff\xd8" + b"\0" * (len(content) - 2)))
    with pytest.raises(DataError, match=rf"/{name} in .*train\.tar is not an image that can be"):
        pack(source_of(folder, tmp_path / "o"), tmp_path / "o", progress=False)


def test_a_folder_with_something_else_is_refused_before_the_scan(tmp_path: Path) -> None:
    pack(digits(), tmp_path, progress=False)
    with pytest.raises(DataError, match=r"another packing \(kind: digits there, imagenet now\)"):
        check_kind(tmp_path, "imagenet")
    check_kind(tmp_path, "digits")
    assert np.all([not path.name.endswith("members.npz") for path in tmp_path.iterdir()])
