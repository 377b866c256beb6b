"""What packing does to an image: nothing, or make it smaller; and the caption beside it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageOps

from data.errors import DataError
from data.images.decode import encode_png

DEFAULT_QUALITY = 90
KEEP = "none"
_PLACEHOLDER = "{}"


@dataclass(frozen=True)
class Encoding:
    """How samples are written.

    Images whose longer side has more than `max_side` pixels are scaled down to it (Lanczos) and
    become JPEG files of `quality` (1 to 100, 4:2:0; 90 if None), upright and without metadata; all
    others keep their bytes, and so do all where it is None. `captions` is a text with one `{}` for
    the class name, to be written as `key.txt`. Images that are transparent in places are put before
    the colour `background` and become PNG files; "none" keeps them, and None refuses them. Raises
    DataError for a value out of range, and for a quality where nothing is encoded.
    """

    max_side: int | None = None
    quality: int | None = None
    captions: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < 1:
            raise DataError(f"max_side is {self.max_side}; it must be at least 1 pixel")
        if self.quality is not None and self.max_side is None:
            raise DataError(
                "quality is for images that are made smaller; give --max-side as well, "
                "or leave --quality out to keep every file as it is"
            )
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise DataError(f"quality is {self.quality}; it must lie between 1 and 100")
        if self.background is not None and not _is_background(self.background):
            raise DataError(
                f"background is {self.background!r}; write a colour, such as white or #f0f0f0, "
                "or none"
            )
        if self.captions is not None and self.captions.count(_PLACEHOLDER) != 1:
            raise DataError(
                f"the caption {self.captions!r} needs one {{}} where the class name belongs, "
                'as in "a photo of a {}"'
            )

    def described(self) -> dict[str, Any]:
        """Return what differs from leaving everything as it is, for the packing's description."""
        differing: dict[str, Any] = {}
        if self.max_side is not None:
            differing |= {"max_side": self.max_side, "quality": self.quality or DEFAULT_QUALITY}
        if self.captions is not None:
            differing["captions"] = self.captions
        if self.background is not None:
            differing["background"] = self.background
        return differing

    def refuses(self, content: bytes) -> bool:
        """Whether nobody has said what is to be seen where this image is transparent."""
        return self.background is None and _seen_through(content) is not None

    def image(self, content: bytes, extension: str) -> tuple[bytes, str]:
        """Return the bytes to pack and their extension.

        Raises whatever Pillow raises for bytes that it cannot decode.
        """
        if self.background not in (None, KEEP) and (image := _seen_through(content)) is not None:
            content, extension = _before(image, str(self.background)), "png"
        if self.max_side is None:
            return content, extension
        with Image.open(io.BytesIO(content)) as image:
            if max(image.size) <= self.max_side:
                return content, extension
        return _smaller(content, self.max_side, self.quality or DEFAULT_QUALITY), "jpg"

    def caption(self, class_name: str) -> bytes | None:
        """Return the text for a class, UTF-8; of "tench, Tinca tinca" only the first name."""
        if self.captions is None:
            return None
        return self.captions.replace(_PLACEHOLDER, class_name.split(",")[0].strip()).encode()


AS_IT_IS = Encoding()


def _is_background(text: str) -> bool:
    if text == KEEP:
        return True
    try:
        ImageColor.getrgb(text)
    except ValueError:
        return False
    return True


def _seen_through(content: bytes) -> Image.Image | None:
    """The image with its transparency, if it is transparent anywhere."""
    image = Image.open(io.BytesIO(content))
    if not image.has_transparency_data:
        return None
    image = image.convert("RGBA")
    return image if image.getextrema()[3][0] < 255 else None  # type: ignore[index]


def _before(image: Image.Image, colour: str) -> bytes:
    """A PNG of the image before a colour."""
    ground = Image.new("RGBA", image.size, colour)
    return encode_png(np.asarray(Image.alpha_composite(ground, image).convert("RGB")))


def _smaller(content: bytes, max_side: int, quality: int) -> bytes:
    image = Image.open(io.BytesIO(content))
    # libjpeg halves sides at no cost; at three times the wanted size, Lanczos sees no difference.
    image.draft(None, (3 * max_side, 3 * max_side))
    # The tag that says how to turn the image is not written, so the pixels are turned.
    image = _eight_bit(ImageOps.exif_transpose(image))
    scale = max_side / max(image.size)
    width, height = (max(round(side * scale), 1) for side in image.size)
    stream = io.BytesIO()
    smaller = image.resize((width, height), Image.Resampling.LANCZOS)
    # Pillow writes the colour profile of the original unless told otherwise.
    smaller.save(stream, format="JPEG", quality=quality, icc_profile=None, exif=b"")
    return stream.getvalue()


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return grey as it is, 16-bit grey by its upper byte, all else as RGB."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    return image.convert("L" if image.mode in {"1", "L"} else "RGB")
