"""Characters of the installed fonts: 62 classes, and no family of fonts on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import features
from tqdm import tqdm

from data.errors import DataError
from data.sources.fonts import CHARACTERS, Font, Unfit, drawings, font_files, open_font
from data.sources.left_out import Collector
from data.sources.source import ArrayReader, Source

FOLDERS = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"))
# Debian's packages that are enough.
PACKAGES = (
    *("fonts-aenigma", "fonts-mplus", "fonts-elstob", "fonts-league-mono", "fonts-junicode"),
    *("fonts-inter", "fonts-stix", "fonts-texgyre", "fonts-cmu", "fonts-fantasque-sans"),
    *("fonts-tiresias", "fonts-dustin", "fonts-lato", "fonts-karla", "fonts-paratype"),
)
# 323 fonts of 62 characters are 20,026 images.
_FONTS, _LEAST, _HELD_OUT = 323, 300, 0.2
# Of characters, how many must be nearest to what the others have for them: pictures reach 2 %.
_LEGIBLE = 0.1
# Of the ink of a font, in the 2-norm over all characters: what is less apart is one design.
_SAME = 0.3


def glyphs(
    folders: Sequence[Path] = FOLDERS, *, fonts: int = _FONTS, least: int = _LEAST
) -> Source:
    """Characters of `fonts` fonts below `folders`, 32×32 grey; a fifth of the fonts is val.

    A family of fonts is on one side only, and so are families whose fonts look the same. Fonts are
    taken from as many families as there are. The same fonts, drawn by the same FreeType, give the
    same images. Raises DataError where less than `least` fonts are fit.
    """
    left_out = Collector()
    found, images = _drawn(_existing(folders), left_out)
    kept = _different_letters(found, images, left_out)
    found, images = [found[i] for i in kept], images[kept]
    kept = _legible(found, images, left_out)
    found, images = [found[i] for i in kept], images[kept]
    places = ", ".join(map(str, folders))
    if len(found) < least:
        raise DataError(
            f"{len(found)} fonts in {places} are fit for glyphs, and {least} are needed; "
            f"apt-get install {' '.join(PACKAGES)}"
        )
    families = _families(found, images)
    chosen = _in_turn(families, fonts)
    val = _held_out(families[chosen])
    if not val.any():
        raise DataError(
            f"the fonts in {places} are of too few families to hold a fifth of them out whole; "
            f"apt-get install {' '.join(PACKAGES)}"
        )
    labels = np.arange(len(CHARACTERS), dtype=np.int64)
    splits = {}
    for split, which in (("train", chosen[~val]), ("val", chosen[val])):
        pixels = images[which].reshape(-1, *images.shape[2:])
        splits[split] = ArrayReader(pixels, np.tile(labels, len(which)))
    notes = [
        f"{len(chosen):,} of {len(found):,} fonts of {len(set(families[chosen])):,} families, "
        f"{len(set(families[chosen[val]])):,} of which are val; drawn by FreeType "
        f"{features.version('freetype2')}"
    ]
    faces = {"fonts": len(chosen), "val_fonts": sorted(found[i].face for i in chosen[val])}
    return Source(
        *("glyphs", "glyphs", [*CHARACTERS], splits, faces),
        left_out=left_out.listed(),
        notes=notes,
    )


def _existing(folders: Sequence[Path]) -> list[Path]:
    existing = [folder for folder in folders if folder.is_dir()]
    if not existing:
        raise DataError(f"there is no folder {' or '.join(map(str, folders))} to look for fonts in")
    return existing


def _drawn(folders: list[Path], left_out: Collector) -> tuple[list[Font], np.ndarray]:
    """The fonts that have all characters, and their drawings [fonts, 62, 32, 32]."""
    found, images = [], []
    for path in tqdm(font_files(folders), desc="fonts", unit="font", leave=False):
        try:
            font = open_font(path)
            images.append(drawings(font))
        except Unfit as reason:
            left_out.add(f"fonts {reason}", path.name)
            continue
        found.append(font)
    if not found:
        return [], np.zeros((0, len(CHARACTERS), 1, 1), np.uint8)
    return found, np.stack(images)


def _different_letters(found: list[Font], images: np.ndarray, left_out: Collector) -> list[int]:
    """The positions of fonts whose small letters are no capitals, each drawing once."""
    kept, seen = [], set()
    for number, (font, drawn) in enumerate(zip(found, images, strict=True)):
        content = drawn.tobytes()
        if (drawn[:26] == drawn[26:52]).all((1, 2)).any():
            left_out.add("fonts with a small letter that is the capital", font.path.name)
        elif content in seen:
            left_out.add("fonts that are drawn as another", font.path.name)
        else:
            kept.append(number)
            seen.add(content)
    return kept


def _legible(found: list[Font], images: np.ndarray, left_out: Collector) -> list[int]:
    """The positions of fonts of letters: pictures and patterns have nothing of the means."""
    if not found:
        return []
    pixels = _coarse(images)
    pixels = pixels - pixels.mean(2, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=2, keepdims=True) + 1e-9
    means = pixels.mean(0)
    means /= np.linalg.norm(means, axis=1, keepdims=True) + 1e-9
    kept = []
    for number, (font, own) in enumerate(zip(found, pixels, strict=True)):
        if np.mean((own @ means.T).argmax(1) == np.arange(len(own))) >= _LEGIBLE:
            kept.append(number)
        else:
            left_out.add("fonts of pictures, or of letters like nobody else's", font.path.name)
    return kept


def _coarse(images: np.ndarray) -> np.ndarray:
    """At half the resolution, float32 [fonts, 62, pixels] in 0 to 1."""
    fonts, characters, height, width = images.shape
    blocks = images.reshape(fonts, characters, height // 2, 2, width // 2, 2)
    return blocks.mean((3, 5), dtype=np.float32).reshape(fonts, characters, -1) / 255


def _families(found: list[Font], images: np.ndarray) -> np.ndarray:
    """The family of each font, as a number; one design under two names makes them one."""
    family = np.array([[f.family for f in found].index(font.family) for font in found])
    flat = _coarse(images).reshape(len(found), -1)
    squares = (flat * flat).sum(1)
    apart = squares[:, None] + squares - 2 * flat @ flat.T
    same = apart < _SAME**2 * np.minimum(squares[:, None], squares)
    for one, other in np.argwhere(np.triu(same, 1)):
        old, new = sorted((family[one], family[other]), reverse=True)
        family[family == old] = new
    return family


def _in_turn(families: np.ndarray, count: int) -> np.ndarray:
    """The positions of up to `count` fonts: one of each family, then a second of each, …"""
    order = np.random.default_rng(0).permutation(len(families))
    turns, taken = np.zeros(len(families), int), {}
    for number in order:
        turns[number] = taken.get(families[number], 0)
        taken[families[number]] = turns[number] + 1
    return np.sort(order[np.argsort(turns[order], kind="stable")][:count])


def _held_out(families: np.ndarray) -> np.ndarray:
    """Which of the fonts are val: whole families, up to a fifth of the fonts; bool."""
    val = np.zeros(len(families), bool)
    for family in np.random.default_rng(1).permutation(np.unique(families)):
        more = val | (families == family)
        if more.sum() <= _HELD_OUT * len(families):
            val = more
    return val
