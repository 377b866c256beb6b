"""Image bytes ↔ pixels, with Pillow."""

import io

import numpy as np
from PIL import Image

_EXTENSION_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


def decode(content: bytes, channels: int | None = None) -> Image.Image:
    """Decode to 8-bit grey (``channels`` 1) or RGB (3); None: whichever the image is stored as.

    Raises:
        Exception: whatever Pillow raises for bytes it cannot decode (it has no one class).
    """
    image = Image.open(io.BytesIO(content))
    image.load()
    if channels is None:
        channels = 1 if image.mode in {"1", "L"} else 3
    return image.convert("L" if channels == 1 else "RGB")


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels, [H, W] or [H, W, 3], losslessly."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def checked_extension(content: bytes) -> str:
    """Decode once to be sure that it can be done, and return the format's extension.

    Raises:
        ValueError: the format is neither JPEG, PNG nor WebP.
        Exception: whatever Pillow raises for bytes it cannot decode.
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
