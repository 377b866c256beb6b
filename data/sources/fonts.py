"""The fonts installed on a machine: which there are, whose family each is, how its letters look."""

from __future__ import annotations

import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
SIDE = 32
# What of an image the largest character of a font may fill, height and width in pixels.
_ROOM = (28, 30)
# The size at which a font is measured: large enough that rounding does not matter.
_MEASURED = 200
_ENDINGS = (".ttf", ".otf")
# OpenType's panose.bFamilyType of fonts that hold pictures.
_PICTORIAL = 5

logging.getLogger("fontTools").setLevel(logging.ERROR)


class Unfit(Exception):
    """Why a font is left out, as a phrase after "fonts"."""


@dataclass(frozen=True)
class Font:
    """One face. `family` is the first word of its typographic family's name: Lato's Black and Thin,
    Noto Sans and Noto Serif count as one.
    """

    path: Path
    family: str
    face: str


def font_files(folders: Sequence[Path]) -> list[Path]:
    """Every TrueType and OpenType font below the folders, by file name."""
    found = {
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix.lower() in _ENDINGS and path.is_file()
    }
    return sorted(found, key=lambda path: (path.name, str(path)))


def open_font(path: Path) -> Font:
    """What a font file says of itself. Raises Unfit where it cannot spell the characters."""
    from fontTools.ttLib import TTFont

    # What fontTools meets in a damaged file may be any exception.
    try:
        with TTFont(path, lazy=True) as tables:
            known = tables.getBestCmap() or {}
            names, metrics = tables["name"], tables.get("OS/2")
            family = names.getDebugName(16) or names.getDebugName(1) or path.stem
            face = names.getDebugName(17) or names.getDebugName(2) or ""
    except Exception as error:
        raise Unfit("that cannot be read") from error
    if getattr(getattr(metrics, "panose", None), "bFamilyType", None) == _PICTORIAL:
        raise Unfit("of pictures")
    if any(ord(character) not in known for character in CHARACTERS):
        raise Unfit("that lack a character")
    word = (family.split() or [path.stem])[0].lower()
    return Font(path, word, f"{family} {face}".strip())


def drawings(font: Font) -> np.ndarray:
    """Its characters, uint8 [62, 32, 32], white on black, as tall as they are beside each other.

    All stand on one line at one size, the largest at which each has room, in the middle of the
    image. Raises Unfit where one is blank or cannot be drawn.
    """
    # FreeType's errors are OSError, and what it cannot make sense of ValueError.
    try:
        boxes = _boxes(_at(font, _MEASURED))
        tall = boxes[:, 3].max() - boxes[:, 1].min()
        wide = (boxes[:, 2] - boxes[:, 0]).max()
        if min(tall, wide) <= 0:
            raise Unfit("with a blank character")
        sized = _at(font, max(1, int(_MEASURED * min(_ROOM[0] / tall, _ROOM[1] / wide))))
        images = _drawn(sized)
    except (OSError, ValueError) as error:
        raise Unfit("that cannot be drawn") from error
    if (images.max((1, 2)) == 0).any():
        raise Unfit("with a blank character")
    return images


def _at(font: Font, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout is FreeType's alone: what else is installed changes no pixel.
    return ImageFont.truetype(str(font.path), size, layout_engine=ImageFont.Layout.BASIC)


def _boxes(font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Left, top, right, bottom of each character's ink, int [62, 4]."""
    return np.array([font.getbbox(character) for character in CHARACTERS]).astype(int)


def _drawn(font: ImageFont.FreeTypeFont) -> np.ndarray:
    boxes = _boxes(font)
    top, bottom = boxes[:, 1].min(), boxes[:, 3].max()
    images = np.zeros((len(CHARACTERS), SIDE, SIDE), np.uint8)
    for number, (character, box) in enumerate(zip(CHARACTERS, boxes, strict=True)):
        image = Image.new("L", (SIDE, SIDE))
        left = (SIDE - (box[2] - box[0])) // 2 - box[0]
        place = (int(left), int((SIDE - (bottom - top)) // 2 - top))
        ImageDraw.Draw(image).text(place, character, fill=255, font=font)
        images[number] = np.asarray(image)
    return images
