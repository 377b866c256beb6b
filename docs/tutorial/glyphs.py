"""Draws a set of images to learn from: letters and digits in class folders, in many fonts.

    python docs/tutorial/glyphs.py glyphs

writes glyphs/A/000.png and so on: 62 classes, grey, turned and shifted at random. The fonts are
those that Matplotlib brings along, so that the same images come out everywhere.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
FAMILIES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")


def class_of(character: str) -> str:
    """A folder's name; some file systems take `a` and `A` for the same."""
    return f"{character}_small" if character.islower() else character


def draw(character: str, font: Path, side: int, random: np.random.Generator) -> Image.Image:
    """One character, `side` pixels high and wide, white on black with some noise."""
    # Drawn larger, so that turning it does not blur it.
    large = 3 * side
    image = Image.new("L", (large, large))
    shape = ImageFont.truetype(font, int(large * random.uniform(0.55, 0.8)))
    centre = tuple(large / 2 + random.uniform(-0.08, 0.08, 2) * large)
    ImageDraw.Draw(image).text(centre, character, fill=255, font=shape, anchor="mm")
    image = image.rotate(random.uniform(-15, 15)).resize((side, side))
    noisy = np.asarray(image) + random.normal(0, 12, (side, side))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to be made")
    parser.add_argument("--each", type=int, default=60, help="images of each class")
    parser.add_argument("--classes", type=int, default=len(CHARACTERS))
    parser.add_argument("--side", type=int, default=28, help="pixels")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    # STIX has more than its text fonts, without letters in their usual places.
    fonts = [f for f in sorted(folder.glob("*.ttf")) if f.stem.startswith(FAMILIES)]
    fonts = [f for f in fonts if not f.stem.endswith("Display")]
    for character in CHARACTERS[: options.classes]:
        place = options.out / class_of(character)
        place.mkdir(parents=True)
        for number in range(options.each):
            font = fonts[random.integers(len(fonts))]
            draw(character, font, options.side, random).save(place / f"{number:03d}.png")


if __name__ == "__main__":
    main()
