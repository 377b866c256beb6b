"""Glyphs of the fonts that matplotlib brings along, letters and symbols: every machine has them."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from data.errors import DataError
from data.sources.fonts import CHARACTERS, Font, drawings, open_font
from data.sources.glyphs import _families, _held_out, _in_turn, glyphs
from data.sources.source import ArrayReader, Source
from launcher import cli

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those fonts, one of them twice, one damaged, and something else."""
    folder = tmp_path_factory.mktemp("fonts")
    for path in FONTS.glob("*.ttf"):
        shutil.copy(path, folder)
    shutil.copy(FONTS / "cmr10.ttf", folder / "again.TTF")
    (folder / "damaged.otf").write_bytes((FONTS / "cmr10.ttf").read_bytes()[:900])
    (folder / "readme.txt").write_text("no font")
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return glyphs([folder], least=10)


def pixels(source: Source, split: str) -> np.ndarray:
    reader = source.splits[split]
    assert isinstance(reader, ArrayReader)
    return reader.images


def test_every_font_gives_all_characters(source: Source) -> None:
    assert source.classes == [*CHARACTERS] and len(CHARACTERS) == 62
    for split, reader in source.splits.items():
        assert pixels(source, split).shape[1:] == (32, 32)
        assert (np.bincount(reader.labels, minlength=62) == len(reader.labels) / 62).all()
    samples = source.samples()
    assert 0 < samples["val"] < samples["train"]
    assert f"{sum(samples.values()) // 62} of" in source.notes[0]


def test_what_is_unfit_is_counted_by_its_reason(source: Source) -> None:
    by_reason = {kind.why: kind for kind in source.left_out}
    # Symbols and the sizes of STIX's brackets have no letters; one font is there twice.
    assert by_reason["fonts that lack a character"].count >= 10
    assert by_reason["fonts that are drawn as another"].names == ["cmr10.ttf"]
    assert by_reason["fonts that cannot be read"].names == ["damaged.otf"]


def test_no_family_is_on_both_sides(source: Source, folder: Path) -> None:
    val = {tuple(image.ravel()) for image in pixels(source, "val")}
    sides: dict[str, set[bool]] = {}
    for name in (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSerif",
        "STIXGeneral",
        "STIXGeneralItalic",
    ):
        font = open_font(folder / f"{name}.ttf")
        held_out = [tuple(image.ravel()) in val for image in drawings(font)]
        assert all(held_out) or not any(held_out)
        sides.setdefault(font.family, set()).add(held_out[0])
    assert sides.keys() == {"dejavu", "stixgeneral"}
    assert all(len(side) == 1 for side in sides.values())


def test_the_same_fonts_give_the_same_images(source: Source, folder: Path) -> None:
    assert glyphs([folder], least=10).fingerprint() == source.fingerprint()
    fewer = glyphs([folder], least=10, fonts=12)
    assert sum(fewer.samples().values()) == 12 * 62


def test_characters_stand_on_one_line_at_one_size(folder: Path) -> None:
    drawn = dict(zip(CHARACTERS, drawings(open_font(folder / "DejaVuSans.ttf")), strict=True))
    rows = {c: np.flatnonzero(image.max(1)) for c, image in drawn.items()}
    assert len(rows["c"]) < len(rows["C"]) and len(rows["x"]) < len(rows["X"])
    assert rows["x"][-1] == rows["X"][-1] < rows["p"][-1]
    columns = np.flatnonzero(drawn["I"].max(0))
    assert abs(columns.mean() - 15.5) <= 1
    everything = np.stack(list(drawn.values())).max(0)
    assert 26 <= len(np.flatnonzero(everything.max(1))) <= 30


def test_one_design_under_two_names_is_one_family() -> None:
    random = np.random.default_rng(0)
    one, other = random.integers(0, 255, (2, 62, 32, 32)).astype(np.uint8)
    near = np.clip(one.astype(int) + random.integers(-9, 9, one.shape), 0, 255).astype(np.uint8)
    found = [Font(Path(name), name, name) for name in ("a", "b", "c", "a")]
    # The last one, of family a, makes nothing of b and c but what they are.
    assert _families(found, np.stack([one, other, near, other // 2])).tolist() == [0, 1, 0, 0]


def test_families_take_turns_and_are_held_out_whole() -> None:
    families = np.repeat([0, 1, 2, 3, 4, 5], [50, 1, 1, 1, 1, 6])
    chosen = _in_turn(families, 8)
    assert np.bincount(families[chosen]).tolist() == [2, 1, 1, 1, 1, 2]
    val = _held_out(families)
    assert 1 <= val.sum() <= 12 and not set(families[val]) & set(families[~val])


def test_too_few_fonts_are_refused_with_what_to_install(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "glyphs"
    assert cli.main(["pack", "glyphs", "--fonts", str(folder), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "are fit for glyphs, and 300 are needed; apt-get install fonts-aenigma" in said
    with pytest.raises(DataError, match="there is no folder"):
        glyphs([tmp_path / "nowhere"])
    for path in folder.glob("DejaVu*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(DataError, match="too few families"):
        glyphs([tmp_path], least=1)
    assert not out.exists()
