"""From bytes to pixels: evaluation, the small sets' crop, and ImageNet's augmentation."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import InterpolationMode, v2

from benchmarks.photographs import photograph
from data.augmentation.imagenet import ImagenetAugmentation, random_crop_box, random_erasing_box
from data.augmentation.randaugment import rand_augment
from data.augmentation.steps import Centre, RandomCrop, maybe_mirrored
from data.augmentation.transforms import eval_transform, train_transform
from data.config import DataConfig
from data.images.decode import CorruptImage, encode_png
from data.images.region import Box
from data.shards.manifest import ImageStats

PHOTOGRAPH = photograph(1)
HEIGHT, WIDTH, _ = PHOTOGRAPH.shape
COLOUR = ImageStats(channels=3, mean=[0.5, 0.4, 0.3], std=[0.2] * 3, measured_on=1)
GREY = ImageStats(channels=1, mean=[0.5], std=[0.2], measured_on=1)


def config(**options: Any) -> DataConfig:
    return DataConfig(**{"path": Path(), "image_size": 32} | options)


def jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def train(cfg: DataConfig, content: bytes, seed: int = 0, stats: ImageStats = COLOUR) -> np.ndarray:
    size = cfg.image_size
    out = torch.empty(size, size, stats.channels, dtype=torch.uint8)
    train_transform(cfg, size, stats)(content, seed, out)
    return out.numpy()


def evaluate(cfg: DataConfig, content: bytes, stats: ImageStats = COLOUR) -> np.ndarray:
    out = torch.empty(cfg.image_size, cfg.image_size, stats.channels, dtype=torch.uint8)
    eval_transform(cfg, stats)(content, 0, out)
    return out.numpy()


def drawn_box(cfg: DataConfig, seed: int) -> Box:
    draw = random.Random(seed).random
    return random_crop_box(HEIGHT, WIDTH, cfg.crop_scale, cfg.crop_ratio, draw)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("seed", range(6))
def test_a_crop_is_torchvisions_of_the_same_parameters(seed: int, interpolation: Any) -> None:
    cfg = config(image_size=224, augment="imagenet", interpolation=interpolation)
    content = jpeg(PHOTOGRAPH)
    found, box = train(cfg, content, seed), drawn_box(cfg, seed)
    image: Any = Image.open(io.BytesIO(content))
    mode = InterpolationMode(interpolation)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    expected = v2.functional.resized_crop(tensor, *box, [224, 224], interpolation=mode)
    assert np.array_equal(found, expected.permute(1, 2, 0).numpy())
    # Pillow sums up with weights of 22 bits, torchvision's kernel for tensors with 16.
    other = v2.functional.resized_crop(image, *box, [224, 224], interpolation=mode)
    difference = np.abs(found.astype(int) - np.asarray(other).astype(int))
    assert difference.max() <= (1 if interpolation == "bilinear" else 6)
    assert difference.mean() < 0.3


def test_crops_are_distributed_as_torchvisions() -> None:
    draw, image = random.Random(0).random, torch.empty(3, 300, 400)
    theirs = v2.RandomResizedCrop(224)
    torch.manual_seed(0)
    ours = np.array(
        [random_crop_box(300, 400, (0.08, 1), (3 / 4, 4 / 3), draw) for _ in range(4000)]
    )
    other = [theirs.make_params([image]) for _ in range(4000)]
    keys = ("top", "left", "height", "width")
    reference = np.array([[params[key] for key in keys] for params in other])
    # The means of 4,000 draws have standard errors below 2 pixels.
    assert np.abs(ours.mean(0) - reference.mean(0)).max() < 8
    assert np.abs(ours.std(0) - reference.std(0)).max() < 8
    assert (ours[:, 0] + ours[:, 2]).max() <= 300 and (ours[:, 1] + ours[:, 3]).max() <= 400


def test_a_shape_that_never_fits_gives_the_middle() -> None:
    draw = random.Random(0).random
    assert random_crop_box(10, 1000, (1, 1), (3 / 4, 4 / 3), draw) == Box(0, 493, 10, 13)
    assert random_crop_box(1000, 10, (1, 1), (3 / 4, 4 / 3), draw) == Box(493, 0, 13, 10)


def test_half_of_the_images_are_mirrored() -> None:
    whole = {"crop_scale": (1, 1), "crop_ratio": (1, 1), "augment": "imagenet", "image_size": 64}
    square = jpeg(np.ascontiguousarray(PHOTOGRAPH[:96, :96]))
    plain = train(config(**whole), square)
    found = [train(config(**whole, hflip=True), square, seed) for seed in range(40)]
    mirrored = [np.array_equal(pixels, plain[:, ::-1]) for pixels in found]
    assert all(m or np.array_equal(f, plain) for m, f in zip(mirrored, found, strict=True))
    assert 8 < sum(mirrored) < 32


def test_other_kinds_of_file_and_channels() -> None:
    cfg = config(augment="imagenet", hflip=True, random_erasing=1.0, randaugment="rand-m9-n2-p1")
    luma = PHOTOGRAPH[..., 0].copy()
    for content in (jpeg(PHOTOGRAPH), jpeg(luma), encode_png(PHOTOGRAPH), encode_png(luma)):
        for stats in (COLOUR, GREY):
            assert train(cfg, content, 3, stats).shape == (32, 32, stats.channels)
    with pytest.raises(CorruptImage):
        train(cfg, jpeg(PHOTOGRAPH)[:5000])


def test_randaugment_is_timms_and_leaves_the_generators_alone() -> None:
    from timm.data.auto_augment import rand_augment_transform

    cfg = config(image_size=64, augment="imagenet", randaugment="rand-m9-mstd0.5-inc1")
    content = jpeg(PHOTOGRAPH)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    results = [train(cfg, content, seed) for seed in range(20)]
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[union-attr]
    assert torch.equal(before[2], torch.get_rng_state())
    assert all(np.array_equal(train(cfg, content, seed), results[seed]) for seed in (3, 11))
    plain = cfg.model_copy(update={"randaugment": None})
    changed = sum(not np.array_equal(train(plain, content, s), results[s]) for s in range(20))
    # Two layers, each applied half the time, some of them to no effect.
    assert 8 <= changed <= 20

    draw = random.Random(3).random
    random_crop_box(HEIGHT, WIDTH, cfg.crop_scale, cfg.crop_ratio, draw)
    policy = rand_augment_transform(
        "rand-m9-mstd0.5-inc1",
        {
            "translate_const": 28,
            "img_mean": (128, 102, 76),
            "interpolation": Image.Resampling.BILINEAR,
        },
    )
    seed = int(draw() * 2**53)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    assert np.array_equal(np.asarray(policy(Image.fromarray(train(plain, content, 3)))), results[3])


def test_erasing_fills_a_rectangle_with_the_mean() -> None:
    cfg = config(image_size=64, augment="imagenet", random_erasing=1.0)
    plain = cfg.model_copy(update={"random_erasing": 0.0})
    for seed in range(10):
        erased, whole = (train(c, jpeg(PHOTOGRAPH), seed) for c in (cfg, plain))
        rows, columns = np.nonzero((erased != whole).any(axis=2))
        box = erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == [128, 102, 76]).all()
    boxes = [random_erasing_box(64, random.Random(seed).random) for seed in range(500)]
    areas = [box.height * box.width / 64**2 for box in boxes if box is not None]
    assert len(areas) > 450 and min(areas) > 0.015 and max(areas) < 0.35


def test_small_sets_crop_and_evaluation() -> None:
    square = np.arange(64, dtype=np.uint8).reshape(8, 8)
    exact = config(image_size=8, eval_crop_ratio=1.0)
    assert np.array_equal(evaluate(exact, encode_png(square), GREY)[..., 0], square)
    half = config(image_size=4, eval_crop_ratio=0.5)
    assert np.array_equal(evaluate(half, encode_png(square), GREY)[..., 0], square[2:6, 2:6])
    white = encode_png(np.full((8, 8), 255, np.uint8))
    padded = config(image_size=8, augment="crop", crop_padding=4)
    cropped = [train(padded, white, seed, GREY) for seed in range(50)]
    assert {value for pixels in cropped for value in np.unique(pixels).tolist()} == {0, 255}
    ramp = np.tile(np.arange(8, dtype=np.uint8), (8, 1))
    flip = config(image_size=8, hflip=True, eval_crop_ratio=1.0)
    rows = {tuple(train(flip, encode_png(ramp), s, GREY)[0, :, 0].tolist()) for s in range(50)}
    assert rows == {tuple(range(8)), tuple(reversed(range(8)))}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_is_torchvisions(interpolation: Any) -> None:
    content = jpeg(PHOTOGRAPH)
    mode = InterpolationMode(interpolation)
    steps = v2.Compose([v2.Resize(256, interpolation=mode), v2.CenterCrop(224)])
    expected = np.asarray(steps(Image.open(io.BytesIO(content))))
    cfg = config(image_size=224, interpolation=interpolation)
    assert np.array_equal(evaluate(cfg, content), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(67, 101), (131, 40), (32, 33), (29, 29), (36, 36)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_steps_are_torchvisions_pixel_for_pixel_and_draw_for_draw(
    height: int, width: int, mode: str, interpolation: Any
) -> None:
    image: Any = Image.fromarray(PHOTOGRAPH[:height, :width]).convert(mode)
    how = InterpolationMode(interpolation)
    for ratio in (1.0, 0.875, 0.9):
        shorter = round(32 / ratio)
        theirs = v2.Compose([v2.Resize([shorter], interpolation=how), v2.CenterCrop(32)])(image)
        ours: Any = Centre(32, ratio, interpolation)(image)
        assert np.array_equal(theirs, ours)
    square: Any = Centre(32, 1.0, interpolation)(image)
    for seed, padding in enumerate((0, 1, 4, 4, 4, 4, 40)):
        torch.manual_seed(seed)
        theirs = v2.Compose([v2.RandomCrop(32, padding=padding), v2.RandomHorizontalFlip()])(square)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        ours: Any = maybe_mirrored(RandomCrop(32, padding)(square))
        assert np.array_equal(theirs, ours)
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"crop_scale": (0.5, 0.1)}, "smaller one first"),
        ({"crop_scale": (0.5, 1.5)}, "at most the whole image"),
        ({"crop_ratio": (0, 1)}, "above 0"),
        ({"randaugment": "augmix-m3"}, "as timm writes it"),
        ({"randaugment": "rand-m9-x3"}, "as timm writes it"),
        ({"random_erasing": 2}, "random_erasing"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"mixup": -1}, "mixup"),
        ({"augment": "crop", "random_erasing": 0.5}, "random_erasing needs augment: imagenet"),
        ({"augment": "none", "randaugment": "rand-m9"}, "randaugment needs augment: imagenet"),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        config(**{"augment": "imagenet"} | options)


def test_a_second_call_does_not_write_to_the_first() -> None:
    augmentation = ImagenetAugmentation(config(augment="imagenet", hflip=True), 32, COLOUR)
    outs = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    for seed in range(8):
        augmentation(jpeg(PHOTOGRAPH), seed, outs[seed])
    again = torch.zeros(32, 32, 3, dtype=torch.uint8)
    augmentation(jpeg(PHOTOGRAPH), 2, again)
    assert torch.equal(again, outs[2])


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m9-mstd0.5-inc1"])
def test_the_strongest_posterize_keeps_a_bit(policy: str) -> None:
    """timm asks Pillow for 0 bits at magnitude 10, which a draw around 9 reaches as well."""
    augment = rand_augment(policy, size=32, mean=(124, 116, 104), bicubic=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    # 400 draws do reach it: images of nothing but 0 and 128.
    assert any(set(np.unique(np.asarray(augment(image, seed)))) == {0, 128} for seed in range(400))
