"""`scl pack`: what it says, what it refuses before it begins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data.shards.manifest import load_manifest
from launcher import cli
from tests.data.conftest import image_bytes
from tests.data.imagenet import write_imagenet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(9):
        path = tmp_path / "in" / "train" / ("cat" if k < 6 else "dog") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(k, side=20))
    return tmp_path / "in"


def pack(*words: str | Path) -> int:
    return cli.main(["pack", *map(str, words)])


def test_the_table_and_the_picture(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    options = ("--max-side", "12", "--quality", "80", "--workers", "1", "--val-fraction", "0")
    assert pack("imagefolder", folder, "--out", out, *options) == 0
    said = capsys.readouterr().out
    rows = [re.findall(r"[\w.]+", line) for line in said.splitlines()]
    assert ["train", "9", "2", "1", "0.0", "3", "dog", "6", "cat"] in rows
    assert str(out / "train/contact_sheet.png") in said
    assert f"note: no val split: {folder} has no val/; training needs one" in said
    assert load_manifest(out / "train").source["options"] == {"max_side": 12, "quality": 80}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert pack("imagefolder", folder, "--out", out, *options) == 0
    assert capsys.readouterr().out == said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_resumed_packing_counts_what_was_there_as_done(folder: Path, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    words = ("imagefolder", folder, "--out", out, "--shard-samples", "3", "--workers", "1")
    words += ("--val-fraction", "0")
    assert pack(*words) == 0
    (out / "train/manifest.json").unlink()
    (out / "train/shard-000001.tar").unlink()
    capsys.readouterr()
    assert pack(*words) == 0
    said = capsys.readouterr().err
    # The first line of the bar already has them; what is left is one shard.
    assert re.search(r"packing:\s+67%.* 6/9 ", said) and " 9/9 " in said
    assert "img/s" in said


def test_a_folder_without_val_gets_one_and_says_so(folder: Path, tmp_path: Path, capsys) -> None:
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    assert pack("imagefolder", folder, "--out", tmp_path / "out", "--workers", "1") == 0
    said = capsys.readouterr().out
    assert load_manifest(tmp_path / "out" / "val").samples == 2
    assert "note: val is 0.222 of each class, held out of" in said
    assert "note: left out 1 that are no images by their names: cat/notes.txt" in said


def test_usage_errors_leave_nothing_behind(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    tars = write_imagenet(tmp_path / "tars", per_class=1, val=6).folder
    for words, sentence in (
        (("imagefolder", folder, "--quality", "80"), "give --max-side as well"),
        (("imagenet", tars, "--captions", "a photo"), "needs one {} where the class name"),
        (("imagenet", tars, "--max-side", "0"), "max_side is 0"),
        (("imagenet",), "where is ILSVRC2012_img_train.tar?"),
        (("huggingface", folder), "holds no training split"),
        (("imagefolder", folder, "--leave-out", "2"), "--leave-out is 2; it must lie between"),
    ):
        assert pack(*words, "--out", out) == 2
        assert sentence in capsys.readouterr().err
        assert not out.exists()


def test_imagenet_says_what_it_reads(tmp_path: Path, capsys) -> None:
    tars = write_imagenet(tmp_path / "tars", per_class=2, val=6).folder
    out = tmp_path / "out"
    assert pack("imagenet", tars, "--out", out, "--workers", "1") == 0
    said = capsys.readouterr()
    assert f"train from {tars}/ILSVRC2012_img_train.tar, val from {tars}/ILSVRC2012" in said.out
    assert "scanning ILSVRC2012_img_train.tar" in said.err
    assert pack("imagenet", tars, "--out", out, "--workers", "1") == 0
    assert "scanning" not in capsys.readouterr().err


def test_index_shows_what_it_found(tmp_path: Path, make_shards, capsys) -> None:
    folder = make_shards(tmp_path / "birds" / "train")
    assert pack("index", folder) == 2
    assert "--label-from json:FIELD" in capsys.readouterr().err
    assert pack("index", folder, "--label-from", "json:label") == 0
    assert (folder / "contact_sheet.png").exists()
    assert re.search(r"train\W+4\W+2\W+1\W", capsys.readouterr().out)


@pytest.fixture
def make_shards():
    from webdataset.writer import TarWriter

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        with TarWriter(str(folder / "0.tar")) as writer:
            for k in range(4):
                image = image_bytes(k, "JPEG")
                writer.write({"__key__": str(k), "jpg": image, "json": {"label": k % 2}})
        return folder

    return make


def test_what_the_file_system_refuses_is_a_sentence(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert pack("imagefolder", folder, "--out", out) == 2
        assert "a file is where a folder should be" in capsys.readouterr().err
    assert pack("imagefolder", folder, "--out", tmp_path / "out", "--workers", "1") == 0
    for name in ("manifest.json", "index.npz"):
        (tmp_path / "out" / "val" / name).unlink()
        (tmp_path / "out" / "val" / name).mkdir()
    assert pack("index", tmp_path / "out" / "val") == 2
    assert "a folder is where a file should be" in capsys.readouterr().err
    shard = next((tmp_path / "out" / "train").glob("*.tar"))
    shard.unlink()
    shard.mkdir()
    assert cli.main(["doctor", str(tmp_path / "out" / "train")]) == 1
    assert "Traceback" not in capsys.readouterr().err
