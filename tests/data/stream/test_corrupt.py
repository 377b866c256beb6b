"""Every kind of bad or odd input has one outcome, that of the table in docs/data_reading.md."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import DataConfig
from data.errors import DataError
from data.packing.adopt import index_shards
from data.packing.pack import pack
from data.shards.doctor import examine
from data.sources.image_folder import imagefolder
from data.stream.dataset import ShardDataset
from data.stream.pipeline import eval_stream, open_split, train_stream
from data.stream.plan import BatchPlan
from tests.data.conftest import MakeTar

SIDE = 32
SAMPLES, ODD = 9, 5
RNG = np.random.default_rng(0)
# Smooth, so that JPEG keeps it nearly as it is.
PIXELS = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((SIDE, SIDE))
)
GREY = PIXELS[..., 0]


def encoded(pixels: np.ndarray | Image.Image, form: str, mode: str = "", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, format=form, **options)
    return stream.getvalue()


JPEG = encoded(PIXELS, "JPEG", quality=95)
PNG = encoded(PIXELS, "PNG")
FRAMES = {"save_all": True, "append_images": [Image.fromarray(255 - PIXELS)]}


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(PIXELS, "JPEG", quality=95, exif=exif)


def alpha() -> bytes:
    opaque = np.dstack([PIXELS, RNG.integers(0, 256, PIXELS.shape[:2], dtype=np.uint8)])
    return encoded(opaque, "PNG")


DAMAGED = {
    "truncated JPEG": ("jpg", JPEG[: len(JPEG) // 2]),
    "JPEG cut near its end": ("jpg", JPEG[:-40]),
    "truncated PNG": ("png", PNG[: len(PNG) // 2]),
    "zero bytes": ("jpg", b""),
    "no image": ("jpg", b"<html>404 Not Found</html>"),
    "only a header": ("jpg", JPEG[:20]),
}
SIXTEEN = (GREY.astype(np.uint16) << 8) + 77
THREE_GREYS = np.dstack([GREY] * 3)
ODDITIES: dict[str, tuple[str, bytes, np.ndarray, int]] = {
    "CMYK": ("jpg", encoded(PIXELS, "JPEG", "CMYK", quality=95), PIXELS, 12),
    "grey JPEG": ("jpg", encoded(GREY, "JPEG", quality=95), THREE_GREYS, 4),
    "grey PNG": ("png", encoded(GREY, "PNG"), THREE_GREYS, 0),
    "16-bit grey": ("png", encoded(SIXTEEN, "PNG"), THREE_GREYS, 0),
    "palette": ("png", encoded(PIXELS, "PNG", "P"), PIXELS, 60),
    "alpha": ("png", alpha(), PIXELS, 0),
    "animated PNG": ("png", encoded(PIXELS, "PNG", **FRAMES), PIXELS, 0),
    "animated WebP": ("webp", encoded(PIXELS, "WEBP", lossless=True, **FRAMES), PIXELS, 0),
    "EXIF-rotated": ("jpg", turned(), PIXELS, 12),
}


def write_split(root: Path, make_tar: MakeTar, extension: str, content: bytes) -> DataConfig:
    """One shard of sound JPEGs, but for sample ODD."""
    members = []
    for k in range(SAMPLES):
        image = (extension, content) if k == ODD else ("jpg", JPEG)
        members += [(f"{k:04d}.{image[0]}", image[1]), (f"{k:04d}.cls", str(k).encode())]
    make_tar(root / "train" / "a.tar", members)
    index_shards(root / "train", progress=False)
    return DataConfig(path=root, image_size=SIDE, eval_crop_ratio=1.0, eval_batch_size=4)


def train(config: DataConfig) -> tuple[dict[str, torch.Tensor], ShardDataset]:
    dataset = open_split(config, "train")
    plan = BatchPlan(dataset.shard_sizes, 0, SAMPLES)
    (batch,) = train_stream(dataset, plan, config, epochs=1)
    return batch, dataset


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_images_are_counted_and_replaced(
    kind: str, tmp_path: Path, make_tar: MakeTar, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_split(tmp_path, make_tar, *DAMAGED[kind])
    batch, dataset = train(config)
    place = batch["id"].tolist().index(ODD)
    assert batch["corrupt"].tolist() == [int(k == place) for k in range(SAMPLES)]
    assert batch["label"][place] == ODD + 1
    assert list(dataset.corrupt) == [ODD]
    assert dataset.corrupt_per_shard() == {"a.tar": 1}
    assert "corrupt sample 0005 in a.tar replaced by a neighbour: " in caplog.text
    # Evaluation keeps its count, and knows which sample is not to be judged.
    batches = list(eval_stream(dataset, config))
    valid = torch.cat([b["id"][b["valid"]] for b in batches]).tolist()
    assert valid == list(range(SAMPLES))
    assert sum(int(b["corrupt"][b["valid"]].sum()) for b in batches) == 1
    (problem,) = examine(tmp_path / "train", progress=False).problems
    assert problem.key == "0005"


def test_a_truncated_image_is_corrupt_for_every_crop(tmp_path: Path, make_tar: MakeTar) -> None:
    """Though only the rows that a crop needs are decoded."""
    large = np.asarray(Image.fromarray(PIXELS).resize((320, 320)))
    content = encoded(large, "JPEG", quality=95)
    config = write_split(tmp_path, make_tar, "jpg", content[: len(content) // 2])
    config = config.model_copy(update={"augment": "imagenet", "image_size": 200})
    dataset = open_split(config, "train").with_seed(0, 40)
    assert all(int(dataset[epoch, ODD]["corrupt"]) for epoch in range(40))


@pytest.mark.parametrize("kind", DAMAGED)
def test_packing_refuses_damaged_images_by_name(kind: str, tmp_path: Path) -> None:
    extension, content = DAMAGED[kind]
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "raw" / split / name).mkdir(parents=True)
            (tmp_path / "raw" / split / name / "sound.jpg").write_bytes(JPEG)
    (tmp_path / "raw" / "train" / "cat" / f"bad.{extension}").write_bytes(content)
    with pytest.raises(DataError, match=rf"cat/bad.{extension}( is not an image|\); copy)"):
        pack(imagefolder(tmp_path / "raw"), tmp_path / "out", progress=False, workers=1)


@pytest.mark.parametrize("kind", ODDITIES)
def test_odd_images_are_read_as_documented(kind: str, tmp_path: Path, make_tar: MakeTar) -> None:
    extension, content, expected, tolerance = ODDITIES[kind]
    batch, dataset = train(write_split(tmp_path, make_tar, extension, content))
    assert not batch["corrupt"].any()
    assert not dataset.corrupt
    image = batch["image"][batch["id"].tolist().index(ODD)].permute(1, 2, 0).numpy()
    assert image.shape == (SIDE, SIDE, 3)
    assert np.abs(image.astype(int) - expected.astype(int)).max() <= tolerance
    assert not examine(tmp_path / "train", progress=False).problems


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, make_tar: MakeTar) -> None:
    ramp = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)
    batch, _ = train(write_split(tmp_path, make_tar, "png", encoded(ramp, "PNG")))
    image = batch["image"][batch["id"].tolist().index(ODD), 0].numpy()
    assert np.array_equal(image, (ramp >> 8).astype(np.uint8))


LABELS = {
    "missing label": ([("a.jpg", JPEG)], "'a' .* has an image but no label; add a.cls"),
    "missing image": ([("a.cls", b"1")], "'a' .* has a label but no image; add one as jfif, jpe"),
    "a kind not read": (
        [("a.gif", encoded(PIXELS, "GIF")), ("a.cls", b"1")],
        "'a' .* has a label but no image",
    ),
    "a word": ([("a.jpg", JPEG), ("a.cls", b"cat")], "'a' .* has the label 'cat'; a .cls must"),
    "a fraction": ([("a.jpg", JPEG), ("a.cls", b"1.5")], "has the label '1.5'; a .cls must hold"),
    "negative": ([("a.jpg", JPEG), ("a.cls", b"-1")], "has the label '-1'; a .cls must hold one"),
    "empty": ([("a.jpg", JPEG), ("a.cls", b"")], "has the label ''; a .cls must hold one integer"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_bad_labels_are_refused_when_indexed(kind: str, tmp_path: Path, make_tar: MakeTar) -> None:
    members, sentence = LABELS[kind]
    make_tar(tmp_path / "train" / "x.tar", [("0.jpg", JPEG), ("0.cls", b"0"), *members])
    with pytest.raises(DataError, match=sentence):
        index_shards(tmp_path / "train", progress=False)
    assert not (tmp_path / "train" / "manifest.json").exists()


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "in an image": lambda tar: tar[: 512 + 100],
    "in a header": lambda tar: tar[: len(tar) // 2 // 512 * 512 + 200],
    "at its end": lambda tar: tar[: -10 * 1024],
    "zero bytes": lambda tar: b"",
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_truncated_tar_is_refused(cut: str, tmp_path: Path, make_tar: MakeTar) -> None:
    config = write_split(tmp_path, make_tar, "jpg", JPEG)
    tar = tmp_path / "train" / "a.tar"
    tar.write_bytes(CUTS[cut](tar.read_bytes()))
    # When training starts, before anything is read.
    with pytest.raises(DataError, match=r"a.tar has \d+ bytes instead of \d+"):
        open_split(config, "train")
    assert examine(tmp_path / "train", progress=False).problems
    with pytest.raises(DataError, match=r"a\.tar (is not a whole|holds no|has an image but no)"):
        index_shards(tmp_path / "train", progress=False)


def test_a_label_beyond_the_classes_is_found(tmp_path: Path, make_tar: MakeTar) -> None:
    make_tar(tmp_path / "train" / "a.tar", [("0.jpg", JPEG), ("0.cls", b"7")])
    with pytest.raises(DataError, match="has labels up to 7 but only 2 class names"):
        index_shards(tmp_path / "train", classes=["cat", "dog"], progress=False)
