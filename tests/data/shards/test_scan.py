"""Shards of others as their writers allow: which samples are taken, which refused, which named."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from data.errors import DataError
from data.shards.index import key_at
from data.shards.scan import ShardRows, scan_shard
from tests.data.conftest import MakeTar


def images(path: Path, rows: ShardRows) -> list[bytes]:
    content = path.read_bytes()
    places = zip(rows.offset.tolist(), rows.size.tolist(), strict=True)
    return [content[first : first + size] for first, size in places]


def test_keys_with_dots_are_samples_like_any_other(tmp_path: Path, make_tar: MakeTar) -> None:
    members = []
    for k in range(6):
        for key in (f"scan_v1.{k:03d}", f"scan_{k:03d}"):
            members += [(f"{key}.jpg", key.encode()), (f"{key}.cls", str(k).encode())]
    path = make_tar(tmp_path / "s.tar", members)
    rows = scan_shard(path)
    assert images(path, rows) == [content for name, content in members if name.endswith("jpg")]
    assert rows.label.tolist() == [k for k in range(6) for _ in range(2)]
    assert rows.left_out == []
    assert key_at(path, int(rows.offset[4])) == "scan_v1.002"


def test_a_mask_beside_a_sample_is_none(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [("7.jpg", b"image"), ("7.mask.png", b"mask"), ("7.cls", b"1")]
    rows = scan_shard(make_tar(tmp_path / "s.tar", members))
    assert (rows.label.tolist(), rows.left_out) == ([1], [])


def test_images_that_belong_to_no_sample_are_named(tmp_path: Path, make_tar: MakeTar) -> None:
    members = [
        ("0.jpg", b"image"),
        ("0.cls", b"1"),
        ("a.mask.png", b"no sample beside it"),
        ("b.gif", b"another format"),
        ("readme.txt", b"no image"),
    ]
    rows = scan_shard(make_tar(tmp_path / "s.tar", members))
    assert rows.left_out == [
        ("without an image and a label under one key", "a.mask.png"),
        ("in formats that are not read", "b.gif"),
    ]


def test_links_inside_a_tar_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind, target in [
            ("d/0.png", tarfile.REGTYPE, ""),
            ("d/0.cls", tarfile.REGTYPE, ""),
            ("d/1.png", tarfile.LNKTYPE, "d/0.png"),
            ("d/1.cls", tarfile.REGTYPE, ""),
            ("d/2.png", tarfile.SYMTYPE, "0.png"),
            ("d/2.cls", tarfile.LNKTYPE, "d/1.cls"),
            ("d/3.png", tarfile.SYMTYPE, "/elsewhere/3.png"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            content = {"d/0.png": b"pixels", "d/0.cls": b"0", "d/1.cls": b"1"}.get(name, b"")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    rows = scan_shard(path)
    assert images(path, rows) == [b"pixels"] * 3
    assert rows.label.tolist() == [0, 1, 1]
    assert rows.left_out == [("links to what is not in the tar before them", "d/3.png")]


def test_a_key_that_comes_again_is_refused(tmp_path: Path, make_tar: MakeTar) -> None:
    """What `tar -r` replaces stays in the tar."""
    members = [
        (f"{k}.{kind}", content)
        for k in range(4)
        for kind, content in (("jpg", b"image"), ("cls", b"0"))
    ]
    path = make_tar(tmp_path / "s.tar", [*members, ("2.jpg", b"image"), ("2.cls", b"1")])
    with pytest.raises(DataError, match=r"sample '2' in .*s\.tar is there twice; write the shard"):
        scan_shard(path)


def test_only_images_without_labels_are_no_samples(tmp_path: Path, make_tar: MakeTar) -> None:
    path = make_tar(tmp_path / "s.tar", [("a.1.jpg", b""), ("a.2.jpg", b"")])
    with pytest.raises(DataError, match=r"holds no samples .*; 2 images have no label"):
        scan_shard(path)
