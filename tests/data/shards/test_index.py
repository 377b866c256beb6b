"""The index: what a scan finds in tars, good and bad."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.shards.index import SampleIndex, key_at
from data.shards.scan import scan_shard

IMG = b"not decoded here"


def test_scan_finds_every_layout(tmp_path: Path, make_tar) -> None:
    members = [
        ("./000.jpg", b"one"),
        ("./000.cls", b"3"),
        ("./000.json", b"{}"),
        ("dir.v1/001.cls", b"0\n"),
        ("dir.v1/001.JPEG", b"three"),
        ("dir.v1/001.seg.png", b"a mask, not the image"),
        ("x" * 150 + ".webp", b"long name"),
        ("x" * 150 + ".cls", b"12"),
        ("lonely.txt", b"no sample at all"),
        ("._junk", b""),
    ]
    path = make_tar(tmp_path / "s.tar", members)
    rows = scan_shard(path)
    assert rows.label.tolist() == [3, 0, 12]
    content = path.read_bytes()
    found = [
        content[o : o + n] for o, n in zip(rows.offset.tolist(), rows.size.tolist(), strict=True)
    ]
    assert found == [b"one", b"three", b"long name"]
    assert key_at(path, int(rows.offset[0])) == "./000"
    assert key_at(path, int(rows.offset[1])) == "dir.v1/001"


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("k.jpg", IMG)], r"sample 'k' in .*bad.tar has an image but no label; add k.cls"),
        ([("a.jpg", IMG), ("b.cls", b"1")], r"sample 'a' in .* has an image but no label"),
        ([("k.cls", b"1"), ("k.txt", b"")], r"sample 'k' in .* has a label but no image"),
        ([("k.jpg", IMG), ("k.cls", b"cat")], r"sample 'k' in .* has the label 'cat'"),
        ([("k.jpg", IMG), ("k.cls", b"")], r"sample 'k' in .* has the label ''"),
        ([("k.jpg", IMG), ("k.cls", b"-1")], r"has the label '-1'; a .cls must hold one integer"),
        ([("k.jpg", IMG), ("k.cls", b"\xff")], r"has the label '\\xff'"),
        ([("k.jpg", IMG), ("k.png", IMG), ("k.cls", b"1")], r"'k' .* more than one image"),
        ([("k.jpg", IMG), ("k.cls", b"1"), ("k.cls", b"1")], r"'k' .* more than one .cls"),
        ([("readme.txt", b"")], r"bad.tar holds no samples"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, make_tar, members, sentence: str) -> None:
    path = make_tar(tmp_path / "bad.tar", members)
    with pytest.raises(DataError, match=sentence):
        scan_shard(path)


def test_truncated_and_compressed_tars_are_refused(tmp_path: Path, make_tar) -> None:
    path = make_tar(tmp_path / "s.tar", [("k.cls", b"1"), ("k.jpg", b"x" * 5000)])
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"s.tar is not a whole, uncompressed tar"):
        scan_shard(path)
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as tar:
        tar.add(path, "k.jpg")
    with pytest.raises(DataError, match=r"gz.tar is not a whole, uncompressed tar"):
        scan_shard(tmp_path / "gz.tar")


def test_a_tar_cut_at_the_edge_of_a_sample_is_refused(tmp_path: Path, make_tar) -> None:
    members = [m for i in range(4) for m in ((f"{i}.png", IMG), (f"{i}.cls", b"1"))]
    path = make_tar(tmp_path / "s.tar", members)
    whole = path.read_bytes()
    assert len(scan_shard(path).label) == 4
    path.write_bytes(whole[: whole.index(b"2.png")])
    with pytest.raises(DataError, match=r"s\.tar is not a whole, .*its end is missing"):
        scan_shard(path)
    path.write_bytes(whole.replace(b"2.png", b"\xff.png"))
    with pytest.raises(DataError, match=r"no tar header at byte 4,096"):
        scan_shard(path)


def test_roundtrip_and_equal_bytes(tmp_path: Path, make_tar) -> None:
    shards = [
        make_tar(
            tmp_path / f"{k}.tar",
            [m for i in range(k + 1) for m in ((f"{i}.png", IMG), (f"{i}.cls", b"%d" % i))],
        )
        for k in range(3)
    ]
    index = SampleIndex.from_rows([scan_shard(shard) for shard in shards])
    index.save(tmp_path / "a.npz")
    index.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = SampleIndex.load(tmp_path / "a.npz")
    assert loaded.shard.tolist() == [0, 1, 1, 2, 2, 2]
    assert loaded.label.tolist() == [0, 0, 1, 0, 1, 2]
    for name, kind in {"shard": "i4", "offset": "i8", "size": "i4", "label": "i4"}.items():
        assert getattr(loaded, name).dtype == np.dtype(kind)
        assert np.array_equal(getattr(loaded, name), getattr(index, name))


def test_unreadable_indices_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.npz"
    with pytest.raises(
        DataError, match=r"there is no .*index.npz; rebuild it with `scl pack index"
    ):
        SampleIndex.load(path)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match="not a readable index"):
        SampleIndex.load(path)
    np.savez(path, shard=np.zeros(1))
    with pytest.raises(DataError, match="not a readable index"):
        SampleIndex.load(path)
    np.savez(path, shard=np.zeros(1), offset=np.zeros(1), size=np.zeros(2), label=np.zeros(1))
    with pytest.raises(DataError, match="differ in length"):
        SampleIndex.load(path)


def test_key_at_refuses_a_place_without_header(tmp_path: Path, make_tar) -> None:
    path = make_tar(tmp_path / "s.tar", [("k.jpg", b"\xaa" * 5000), ("k.cls", b"1")])
    with pytest.raises(DataError, match="no tar header before byte 2000"):
        key_at(path, 2000)
