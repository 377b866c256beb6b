"""Which images of a folder are taken, for which split, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.sources.image_folder import imagefolder
from data.sources.source import FileReader, Source
from tests.data.conftest import MakeFolder, image_bytes


def names(source: Source, split: str = "train") -> list[str]:
    reader = source.splits[split]
    assert isinstance(reader, FileReader)
    return reader.names


def said(source: Source) -> str:
    return "\n".join([*source.notes, *map(str, source.left_out)])


def test_a_flat_folder_gets_a_val_split_unless_told_otherwise(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 10, "b": 20})
    source = imagefolder(root, None)
    assert source.samples() == {"train": 27, "val": 3}
    assert np.bincount(source.splits["val"].labels).tolist() == [1, 2]
    assert "val is 0.1 of each class, held out of" in said(source)
    assert source.options == {"val_fraction": 0.1}
    alone = imagefolder(root, 0.0)
    assert alone.samples() == {"train": 30}
    assert "no val split" in said(alone)


def test_of_few_images_at_least_one_of_each_class_is_held_out(make_folder: MakeFolder) -> None:
    source = imagefolder(make_folder({"train/a": 3, "train/b": 3, "train/c": 3}), None)
    assert np.bincount(source.splits["val"].labels).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"Training/a": 2, "Training/b": 1, "Testing/a": 1}, {"train": 3, "val": 1}),
        ({"train/a": 2, "train/b": 1, "validation/b": 2}, {"train": 3, "val": 2}),
        ({"TRAIN/a": 2, "valid/a": 1, "test/a": 3}, {"train": 2, "val": 1, "test": 3}),
        # Classes may have these names, too.
        ({"control": 3, "test": 2}, {"train": 5}),
        ({"train": 3, "car": 2, "bus": 1}, {"train": 6}),
    ],
)
def test_splits_are_found_by_their_usual_names(
    make_folder: MakeFolder, folders: dict[str, int], expected: dict[str, int]
) -> None:
    assert imagefolder(make_folder(folders)).samples() == expected


def test_a_test_folder_that_stands_in_for_val_is_named(make_folder: MakeFolder) -> None:
    source = imagefolder(make_folder({"Training/a": 2, "Testing/a": 1}))
    assert f"val is {source.splits['val'].root}, since there is no other" in said(source)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        ({"train/a": 1, "Training/a": 1}, r"has Training/ and train/, which both mean train"),
        ({"validation/a": 1, "test/a": 1}, r"has test, validation but no train/"),
        ({"archive/train/a": 1, "archive/test/a": 1}, r"archive/ holds train/; name .*archive "),
        ({"train": 2, "val": 1}, r"train has no class folders; images are expected in"),
    ],
)
def test_what_might_be_meant_otherwise_is_refused(
    make_folder: MakeFolder, folders: dict[str, int], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        imagefolder(make_folder(folders))


def test_all_names_of_jpeg_are_read_and_other_formats_counted(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 3})
    for name in ("1.jfif", "2.JPE"):
        (root / "a" / name).write_bytes(image_bytes(7, "JPEG"))
    for k in range(2):
        (root / "a" / f"{k}.gif").write_bytes(image_bytes(k, "GIF"))
    (root / "a" / "notes.txt").write_text("no image")
    with pytest.raises(
        DataError,
        match=r"of 7 images in .*raw 2 would be left out \(2 in formats that are not read, "
        r"a/0\.gif, a/1\.gif\); .*--leave-out 0\.29",
    ):
        imagefolder(root)
    source = imagefolder(root, leave_out=0.29)
    assert len(names(source)) == 5
    assert "left out 2 in formats that are not read: a/0.gif, a/1.gif" in said(source)
    assert "left out 1 that are no images by their names: a/notes.txt" in said(source)


def test_what_a_mac_and_notebooks_leave_behind_is_no_image_and_no_class(
    make_folder: MakeFolder,
) -> None:
    root = make_folder({"train/a": 2, "val/a": 1, "__MACOSX/train/a": 0})
    for folder in ("train/a", "val/a"):
        (root / folder / "._a.0.JPEG").write_bytes(b"\0\5\x16\7 resource fork")
        (root / folder / ".ipynb_checkpoints").mkdir()
        (root / folder / ".ipynb_checkpoints" / "a.0-checkpoint.png").write_bytes(image_bytes(0))
    (root / "train" / ".ipynb_checkpoints").mkdir()
    source = imagefolder(root)
    assert (source.samples(), source.classes) == ({"train": 2, "val": 1}, ["a"])
    assert "left out 4 hidden files and folders: a/._a.0.JPEG" in said(source)


def test_links_to_a_folder_that_was_read_add_nothing(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 2, "a/more": 2, "elsewhere": 1})
    (root / "a" / "itself").symlink_to(root / "a")
    (root / "a" / "again").symlink_to(root / "a" / "more")
    (root / "a" / "gone.png").symlink_to(root / "nowhere.png")
    linked = root.parent / "linked"
    linked.mkdir()
    (linked / "b").symlink_to(root / "a")
    source = imagefolder(linked, leave_out=0.2)
    assert names(source) == ["b/a.0.JPEG", "b/a.1.png", "b/more/a.0.JPEG", "b/more/a.1.png"]
    assert "left out 2 links to folders that were read already: b/again, b/itself" in said(source)
    assert "left out 1 links that lead nowhere: b/gone.png" in said(source)


def test_files_of_no_bytes_are_found_at_once(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 3, "b": 1})
    (root / "a" / "a.1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 4 images in .*raw have no bytes \(a/a\.1\.png\)"):
        imagefolder(root)


def test_folders_beside_the_splits_are_named(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 2, "val/a": 1, "test": 2, "extra/a": 3})
    source = imagefolder(root)
    assert source.samples() == {"train": 2, "val": 1}
    assert "left out 2 folders beside train/: extra/, test/" in said(source)


@pytest.mark.parametrize(
    ("counts", "fraction", "sentence"),
    [
        ({"cat": 4, "dog": 1}, None, r"dog has one image only, .* or use --val-fraction 0"),
        ({"cat": 4, "dog": 1, "owl": 1}, 0.5, r"dog, owl have one image only"),
        ({"cat": 4, "dog": 4}, 0.1, r"of 8 images one part would .* use --val-fraction 0\.25 or"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused_in_words(
    make_folder: MakeFolder, counts: dict[str, int], fraction: float | None, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        imagefolder(make_folder(counts), fraction)


def test_a_reason_names_no_address(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"not an image")
    with pytest.raises(DataError) as refusal:
        imagefolder(tmp_path).splits["train"].read(0)
    assert "cannot identify image file" in str(refusal.value)
    assert "0x" not in str(refusal.value)
