"""What packing does to images: nothing, unless they are too large."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.errors import DataError
from data.packing.encoding import AS_IT_IS, Encoding
from data.packing.pack import pack
from data.packing.writer import ShardWriter, shard_tasks
from data.sources.digits import digits
from data.sources.image_folder import imagefolder
from data.sources.source import Reader
from tests.data.conftest import image_bytes


def encoded(pixels: np.ndarray, form: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=form, **options)
    return stream.getvalue()


def gradient(height: int, width: int) -> np.ndarray:
    """Dark on the left, red growing to the right, green growing downwards."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = 255 * columns // width, 255 * rows // height
    return np.stack([red, green, np.zeros_like(red)], -1).astype(np.uint8)


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def test_by_default_every_byte_stays() -> None:
    content = image_bytes(0, side=900)
    assert AS_IT_IS.image(content, "png") == (content, "png")
    assert AS_IT_IS.described() == {}
    assert AS_IT_IS.caption("tench") is None


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_images_within_the_limit_keep_their_bytes(form: str) -> None:
    content = encoded(gradient(300, 500), form)
    assert Encoding(max_side=500).image(content, "x") == (content, "x")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("height", "width"), [(1500, 2000), (900, 610), (3, 1000)])
def test_larger_ones_keep_their_shape_and_picture(form: str, height: int, width: int) -> None:
    pixels = gradient(height, width)
    content, extension = Encoding(max_side=500).image(encoded(pixels, form), "x")
    image = opened(content)
    scale = 500 / max(height, width)
    assert extension == "jpg" and image.format == "JPEG"
    assert image.size == (max(round(width * scale), 1), max(round(height * scale), 1))
    if height > 3:
        small = np.asarray(image).astype(float)
        wanted = gradient(image.height, image.width)
        assert np.abs(small - wanted).mean() < 3


def test_scaling_is_antialiased() -> None:
    # One-pixel stripes: picking pixels would give black or white, a mean gives grey.
    stripes = np.zeros((1000, 1000), np.uint8)
    stripes[:, ::2] = 255
    content, _ = Encoding(max_side=300).image(encoded(stripes, "PNG"), "png")
    image = opened(content)
    assert image.mode == "L"
    assert np.asarray(image)[20:-20, 20:-20].min() > 100
    assert np.asarray(image)[20:-20, 20:-20].max() < 155


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_turns_the_pixels_of_what_is_scaled(orientation: int) -> None:
    upright = gradient(600, 800)
    stored = np.rot90(upright, {1: 0, 3: 2, 6: 1, 8: 3}[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(np.ascontiguousarray(stored), quality=95, exif=exif.tobytes())
    image = opened(Encoding(max_side=400).image(file, "jpg")[0])
    assert image.size == (400, 300)
    assert not image.getexif()
    assert np.abs(np.asarray(image).astype(float) - gradient(300, 400)).mean() < 3


def test_every_kind_of_pixel_becomes_8_bit_grey_or_rgb() -> None:
    grey16 = (np.mgrid[0:100, 0:100][1] * 655).astype(np.uint16)
    found = opened(Encoding(max_side=50).image(encoded(grey16, "PNG"), "png")[0])
    assert found.mode == "L"
    assert np.abs(np.asarray(found)[25] - np.linspace(0, 253, 50)).mean() < 4
    for mode in ("CMYK", "P", "RGBA", "LA", "1"):
        stream = io.BytesIO()
        kind = "JPEG" if mode == "CMYK" else "PNG"
        Image.fromarray(gradient(100, 100)).convert(mode).save(stream, format=kind)
        found = opened(Encoding(max_side=50).image(stream.getvalue(), "x")[0])
        assert (found.mode, found.size) == ("L" if mode == "1" else "RGB", (50, 50)), mode


def test_quality_decides_the_size_and_metadata_is_left_out() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    file = encoded(noise, quality=95, icc_profile=profile)
    sizes = [len(Encoding(500, quality).image(file, "jpg")[0]) for quality in (50, 90, 98)]
    assert sizes == sorted(sizes) and sizes[0] < 0.7 * sizes[1] < 0.7 * sizes[2]
    default = Encoding(500).image(file, "jpg")[0]
    assert default == Encoding(500, 90).image(file, "jpg")[0]
    assert "icc_profile" not in opened(default).info


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_side": 0}, "max_side is 0; it must be at least 1"),
        ({"quality": 90}, "give --max-side as well"),
        ({"max_side": 500, "quality": 101}, "quality is 101; it must lie between 1 and 100"),
        ({"captions": "a photo"}, r"'a photo' needs one {} where the class name belongs"),
        ({"captions": "{} and {}"}, r"needs one {}"),
    ],
)
def test_bad_options_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        Encoding(**options)


def test_captions_name_the_class() -> None:
    encoding = Encoding(captions="a photo of a {}, {so} to say")
    assert encoding.caption("tench, Tinca tinca") == b"a photo of a tench, {so} to say"
    assert encoding.described() == {"captions": "a photo of a {}, {so} to say"}


def test_damage_that_only_whole_decoding_finds_is_named(tmp_path: Path, make_folder) -> None:
    root = make_folder({"train/a": 1})
    path = root / "train/a/a.0.JPEG"
    source = imagefolder(root)

    class Unchecked:
        labels = source.splits["train"].labels
        where = source.splits["train"].where
        content_hash = source.splits["train"].content_hash

        def read(self, i: int) -> tuple[bytes, str, int]:
            return path.read_bytes()[:200], "jpg", 0

    reader: Reader = Unchecked()
    (tmp_path / "train").mkdir()
    (task,) = shard_tasks(tmp_path, "train", 1, 1, 0)
    with pytest.raises(DataError, match=r"a\.0\.JPEG cannot be made smaller"):
        ShardWriter({"train": reader}, Encoding(max_side=4), ["a"])(task)


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path: Path, monkeypatch) -> None:
    import os

    real = os.fsync

    def forgetful(descriptor: int) -> None:
        os.pwrite(descriptor, b"?", 600)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", forgetful)
    source = digits()
    (tmp_path / "val").mkdir()
    task = shard_tasks(tmp_path, "val", 360, 100, 0)[0]
    with pytest.raises(DataError, match=r"gave back other bytes .*shard-000000\.tar; check the"):
        ShardWriter(source.splits, AS_IT_IS, source.classes)(task)
    assert list((tmp_path / "val").iterdir()) == []


def test_captions_are_written_beside_the_labels(tmp_path: Path) -> None:
    from webdataset.compat import WebDataset

    manifests = pack(digits(), tmp_path, encoding=Encoding(captions="the {}."), progress=False)
    shards = [str(tmp_path / "val" / shard.name) for shard in manifests["val"].shards]
    opened: object = WebDataset(shards, shardshuffle=False)
    texts = [(int(s["cls"]), s["txt"].decode()) for s in opened]  # type: ignore[attr-defined]
    assert len(texts) == 360
    assert all(text == f"the {label}." for label, text in texts)
    assert manifests["val"].source["options"] == {"captions": "the {}."}
