"""What each way to decode and resize one photograph costs, and how its pixels differ.

    python -m benchmarks.decoding [--quick]

One thread, libraries called directly, on generated photographs of ImageNet's size. Timed in turn;
quoted are medians of milliseconds per image. Differences, in levels of 255, are to the exact
result: of simplejpeg's default for decoding, of torchvision's crop of a Pillow image for resizing.
The last line is a JSON object; its ratio is the time of a crop as the loader makes it to that of
decoding the whole image alone.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.common import in_turn, median, median_ratio, options_parser, parse, report, table
from benchmarks.photographs import jpeg
from data.augmentation.imagenet import ImagenetAugmentation, random_crop_box
from data.config import DataConfig
from data.images.jpeg import read_header
from data.images.region import Box, RegionDecoder, native
from data.shards.manifest import ImageStats

SIZE = 224
TARGET = 1 / 0.9
_STATS = ImageStats(channels=3, mean=[0.5] * 3, std=[0.25] * 3, measured_on=1)

Way = Callable[[int], np.ndarray]


class Photographs:
    """JPEGs, their pixels, and a crop of each."""

    def __init__(self, count: int) -> None:
        config = DataConfig(path=Path(), image_size=SIZE, augment="imagenet")
        self.contents = [jpeg(number) for number in range(count)]
        self.pixels = [simplejpeg.decode_jpeg(content) for content in self.contents]
        self.boxes = [
            random_crop_box(
                p.shape[0], p.shape[1], (0.08, 1), (0.75, 4 / 3), random.Random(i).random
            )
            for i, p in enumerate(self.pixels)
        ]
        self._images = [Image.fromarray(p) for p in self.pixels]
        self._decoders = {native: RegionDecoder(native) for native in (False, True)}
        self._augmentation = ImagenetAugmentation(config, SIZE, _STATS)
        self._out = torch.empty(SIZE, SIZE, 3, dtype=torch.uint8)

    def decoding(self) -> dict[str, Way]:
        ways: dict[str, Way] = {
            "simplejpeg": lambda i: simplejpeg.decode_jpeg(self.contents[i]),
            "fastdct": lambda i: simplejpeg.decode_jpeg(self.contents[i], fastdct=True),
            "fastupsample": lambda i: simplejpeg.decode_jpeg(self.contents[i], fastupsample=True),
            "Pillow": lambda i: np.asarray(Image.open(io.BytesIO(self.contents[i]))),
        }
        return ways

    def scaled(self) -> dict[str, Way]:
        return {f"at {n}/8": lambda i, n=n: self._at(i, n) for n in (7, 6, 5, 4, 3, 2, 1)}

    def _at(self, i: int, eighths: int) -> np.ndarray:
        height, width = (-(-side * eighths // 8) for side in self.pixels[i].shape[:2])
        return simplejpeg.decode_jpeg(
            self.contents[i], min_height=height, min_width=width, min_factor=8 / eighths
        )

    def cropping(self) -> dict[str, Way]:
        ways: dict[str, Way] = {"rows to the crop's end": lambda i: self._crop(i, native=False)}
        if native is not None:
            ways["the crop alone"] = lambda i: self._crop(i, native=True)
        return ways

    def _crop(self, i: int, *, native: bool) -> np.ndarray:
        header, box = read_header(self.contents[i]), self.boxes[i]
        assert header is not None
        # Of an output size above every crop, so that none is decoded scaled.
        crop = self._decoders[native].decode(self.contents[i], header, box, 10_000, 3)
        assert crop is not None
        return crop[0].permute(1, 2, 0).numpy()

    def resizing(self) -> dict[str, Way]:
        return {"Pillow, box": self._pillow_box, "torchvision, uint8": self._torchvision}

    def _pillow_box(self, i: int) -> np.ndarray:
        top, left, height, width = self.boxes[i]
        box = (left, top, left + width, top + height)
        return np.asarray(self._images[i].resize((SIZE, SIZE), Image.Resampling.BILINEAR, box))

    def _torchvision(self, i: int) -> np.ndarray:
        tensor = torch.from_numpy(self.pixels[i]).permute(2, 0, 1)
        top, left, height, width = self.boxes[i]
        resized = v2.functional.resized_crop(tensor, top, left, height, width, [SIZE, SIZE])
        return resized.permute(1, 2, 0).numpy()

    def resized_exactly(self, i: int) -> np.ndarray:
        return np.asarray(v2.Resize([SIZE, SIZE])(self._images[i].crop(_corners(self.boxes[i]))))

    def loader(self, i: int) -> np.ndarray:
        """Decoded, cropped and resized as the loader does it."""
        self._augmentation(self.contents[i], i, self._out)
        return self._out.numpy()


def _corners(box: Box) -> tuple[int, int, int, int]:
    return box.left, box.top, box.left + box.width, box.top + box.height


def difference(way: Way, exact: Way, count: int) -> tuple[float, int]:
    """Mean and largest difference over the first images, in levels."""
    parts = [
        np.abs(way(i).astype(np.int16) - exact(i).astype(np.int16)).ravel() for i in range(count)
    ]
    joined = np.concatenate(parts)
    return float(joined.mean()), int(joined.max())


def differences(photographs: Photographs, count: int) -> dict[str, tuple[float, int]]:
    decoding, resizing = photographs.decoding(), photographs.resizing()

    def crop(i: int) -> np.ndarray:
        top, left, height, width = photographs.boxes[i]
        return photographs.pixels[i][top : top + height, left : left + width]

    return {
        **{name: difference(way, decoding["simplejpeg"], count) for name, way in decoding.items()},
        **{name: difference(way, crop, count) for name, way in photographs.cropping().items()},
        **{n: difference(w, photographs.resized_exactly, count) for n, w in resizing.items()},
    }


def main() -> None:
    options = parse(options_parser(__doc__))
    torch.set_num_threads(1)
    count, rounds = (16, 2) if options.quick else (100, 9)
    photographs = Photographs(count)
    ways = {
        **photographs.decoding(),
        **photographs.scaled(),
        **photographs.cropping(),
        **photographs.resizing(),
        "the loader's crop": photographs.loader,
    }
    calls = {n: lambda way=way: [way(i) for i in range(count)] for n, way in ways.items()}
    device = torch.device("cpu")
    timed = in_turn(calls, device, rounds)
    apart = differences(photographs, min(count, 32))
    milliseconds = {name: 1e3 * median(timed, name) / count for name in ways}
    rows = [
        [
            name,
            f"{ms:.3f}",
            *((f"{apart[name][0]:.3f}", f"{apart[name][1]}") if name in apart else ("", "")),
        ]
        for name, ms in milliseconds.items()
    ]
    print(table(["ms per image", "median", "mean difference", "largest"], rows))
    report(
        "decoding",
        ratio=median_ratio(timed, "the loader's crop", "simplejpeg"),
        target=TARGET,
        device=device,
        details={"milliseconds": milliseconds, "differences": apart, "images": count},
    )


if __name__ == "__main__":
    main()
