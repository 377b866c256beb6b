"""Image bytes ↔ pixels: JPEG with libjpeg-turbo, everything else, and every doubt, with Pillow."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from data.images.jpeg import decode_all, read_header

_EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class CorruptImage(Exception):
    """These bytes are no image, or a damaged one; says what the decoder said."""


def decode(content: bytes, channels: int | None = None) -> Image.Image:
    """Decode to 8-bit grey (`channels` 1) or RGB (3); None: whichever the image is stored as.

    Of an animation, the first frame; the orientation in EXIF is ignored, as torchvision and timm
    do; 16 bits become the upper 8. JPEG pixels are those that Pillow would give. Raises
    CorruptImage where the bytes cannot be decoded.
    """
    # Pillow raises many kinds for bytes it cannot decode; all mean the same here.
    try:
        image = _decode_jpeg(content) or _decode_any(content)
    except Exception as error:
        raise CorruptImage(f"{type(error).__name__}: {said_by_pillow(error)}") from error
    if channels is None:
        channels = 1 if image.mode in {"1", "L"} else 3
    return image.convert("L" if channels == 1 else "RGB")


def said_by_pillow(error: Exception) -> str:
    """Its reason without the stream it read from, which it names by an address in memory."""
    return str(error).partition(" <_io.")[0]


def _decode_jpeg(content: bytes) -> Image.Image | None:
    header = read_header(content)
    pixels = None if header is None else decode_all(content, header)
    if pixels is None:
        return None
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _decode_any(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255; of 16-bit colour it takes the upper byte itself.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels, [H, W] or [H, W, 3], losslessly."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def checked_extension(content: bytes) -> str:
    """Decode once to be sure that it can be done, and return the format's extension.

    Raises ValueError where the format is neither JPEG, PNG nor WebP, and whatever Pillow raises for
    bytes that it cannot decode.
    """
    image = Image.open(io.BytesIO(content))
    extension = _EXTENSION_OF_FORMAT.get(image.format or "")
    if extension is None:
        raise ValueError(f"it is {image.format}, not JPEG, PNG or WebP")
    # verify() reads no JPEG data, so it misses truncated files; decoding at 1/8 scale reads
    # all of it at a fraction of the cost.
    image.draft(None, (1, 1))
    image.load()
    return extension
