"""A picture of a packed split, to look at before a cluster does: samples and class sizes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.files import atomic_file
from data.images.decode import decode
from data.packing.summary import class_counts
from data.shards.index import SampleIndex
from data.shards.manifest import INDEX_NAME, Manifest

SHEET_NAME = "contact_sheet.png"
_GRID = 8
_TILE = 128
_GAP = 8
_TEXT = 16
_CHART = 150
_MARGIN = 16
_INK, _GREY, _BAR, _BAD = "#202020", "#707070", "#4878a8", "#c03020"


def draw_contact_sheet(folder: Path, manifest: Manifest) -> Path:
    """Write `folder/contact_sheet.png`: 64 samples, sorted by class, and the class histogram.

    A sample that does not decode is a red tile. Raises DataError where the index cannot be read,
    OSError where a shard cannot.
    """
    index = SampleIndex.load(folder / INDEX_NAME)
    width = 2 * _MARGIN + _GRID * (_TILE + _GAP) - _GAP
    top = _MARGIN + 28
    height = top + _GRID * (_TILE + _TEXT + _GAP) + _TEXT + _CHART + 2 * _TEXT + _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    title = f"{manifest.dataset}, {manifest.split}: {manifest.samples:,} samples"
    ImageDraw.Draw(sheet).text((_MARGIN, _MARGIN), title, _INK, ImageFont.load_default(16))
    for position, i in enumerate(_chosen(index)):
        left = _MARGIN + position % _GRID * (_TILE + _GAP)
        upper = top + position // _GRID * (_TILE + _TEXT + _GAP)
        _draw_sample(sheet, folder, manifest, index, int(i), (left, upper))
    counts = class_counts(index.label, len(manifest.classes))
    _draw_histogram(sheet, counts, manifest.names, height - _MARGIN - _CHART - 2 * _TEXT)
    with atomic_file(folder / SHEET_NAME) as stream:
        sheet.save(stream, format="PNG")
    return folder / SHEET_NAME


def _chosen(index: SampleIndex) -> np.ndarray:
    """Return up to 64 sample ids, spread evenly over the samples sorted by class."""
    by_class = np.argsort(index.label, kind="stable")
    count = min(len(index), _GRID * _GRID)
    return by_class[(np.arange(count) * len(index) + len(index) // 2) // count]


def _draw_sample(
    sheet: Image.Image,
    folder: Path,
    manifest: Manifest,
    index: SampleIndex,
    i: int,
    place: tuple[int, int],
) -> None:
    draw = ImageDraw.Draw(sheet)
    left, top = place
    name = _short(manifest.names[index.label[i]])
    draw.text((left, top + _TILE + 2), name, _INK, ImageFont.load_default(11))
    with (folder / manifest.shards[index.shard[i]].name).open("rb") as stream:
        content = os.pread(stream.fileno(), int(index.size[i]), int(index.offset[i]))
    try:
        image = decode(content).convert("RGB")
    # The picture shows damage as well; `scl doctor` names it.
    except Exception:
        draw.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), _BAD)
        return
    scale = _TILE / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    enlarged = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    image = image.resize(size, enlarged)
    # At the bottom, next to its name.
    sheet.paste(image, (left + (_TILE - size[0]) // 2, top + _TILE - size[1]))


def _short(name: str) -> str:
    """The first of a class's names, as far as it fits below a tile."""
    font = ImageFont.load_default(11)
    text = name.split(",")[0]
    if font.getlength(text) <= _TILE:
        return text
    while text and font.getlength(text + "…") > _TILE:
        text = text[:-1]
    return text + "…"


def _draw_histogram(sheet: Image.Image, counts: np.ndarray, names: list[str], top: int) -> None:
    """Draw one bar per class in the order of labels; of many classes, one bar per pixel."""
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    left, right = _MARGIN, sheet.width - _MARGIN
    low, high = int(counts.argmin()), int(counts.argmax())
    caption = (
        f"samples per class, in the order of labels: {counts[low]:,} ({_short(names[low])}) "
        f"to {counts[high]:,} ({_short(names[high])})"
    )
    draw.text((left, top - 4), caption, _GREY, font)
    base = top + _TEXT + _CHART
    width = (right - left) / len(counts)
    for k, count in enumerate(counts.tolist()):
        first, last = left + k * width, left + (k + 1) * width
        gap = 1 if width >= 4 else 0
        height = _CHART * count / max(int(counts.max()), 1)
        if count:
            draw.rectangle((first, base - height, max(last - 1 - gap, first), base), _BAR)
    draw.line((left, base + 1, right, base + 1), _GREY)
    draw.text((left, base + 3), "0", _GREY, font)
    draw.text((right, base + 3), str(len(counts) - 1), _GREY, font, anchor="ra")
