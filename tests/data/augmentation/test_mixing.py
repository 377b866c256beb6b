"""Mixup and CutMix: exact for any number of ranks and accumulation, and what timm computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch.nn.functional import cross_entropy

from data.augmentation.mixing import mix, mixed_targets, pair_parameters
from data.config import DataConfig
from data.stream.pipeline import normalise, open_split, train_stream
from data.stream.plan import BatchPlan

Batches = list[dict[str, torch.Tensor]]


def config(path: Path = Path(), **options: Any) -> DataConfig:
    return DataConfig(**{"path": path, "image_size": 8, "eval_crop_ratio": 1.0} | options)


def parameters(pairs: int, size: int = 32, **options: Any) -> dict[str, np.ndarray]:
    ids = np.arange(2 * pairs)
    drawn = pair_parameters(config(**options), ids, size, seed=1, epoch=2)
    return {name: value.numpy() for name, value in drawn.items()}


def mixed_by_sample(data: Path, world_size: int, accumulation: int) -> dict[int, torch.Tensor]:
    """Per sample id: the mixed image and target, as one vector."""
    cfg = config(data, mixup=0.4, cutmix=1.0, augment="crop", hflip=True)
    dataset = open_split(cfg, "train")
    found = {}
    for rank in range(world_size):
        plan = BatchPlan(dataset.shard_sizes, 3, 64, world_size, rank, accumulation)
        for batch in train_stream(dataset, plan, cfg, start_step=18, epochs=1):
            images = mix(normalise(batch["image"], dataset.manifest.image), batch)
            targets = mixed_targets(batch, 10)
            for i, sample in enumerate(batch["id"].tolist()):
                found[sample] = torch.cat([images[i].flatten(), targets[i]])
    return found


def test_ranks_accumulation_and_seeking_change_nothing(packed_digits: Path) -> None:
    whole = mixed_by_sample(packed_digits, 1, 1)
    assert len(whole) == 4 * 64
    for world_size, accumulation in ((1, 2), (2, 1), (2, 4)):
        other = mixed_by_sample(packed_digits, world_size, accumulation)
        assert other.keys() == whole.keys()
        assert all(torch.equal(other[sample], whole[sample]) for sample in whole)
    lams = torch.stack([vector[-10:].max() for vector in whole.values()])
    assert (lams < 0.999).float().mean() > 0.5, "most were mixed"


def test_both_of_a_pair_get_the_same_and_pairs_differ() -> None:
    drawn = parameters(500, mixup=0.8, cutmix=1.0)
    for values in drawn.values():
        assert np.array_equal(values[0::2], values[1::2])
    assert len(np.unique(drawn["mix_lam"])) > 300
    cut = (drawn["mix_box"][::2, 1] > 0).mean()
    # 500 tosses of a coin are within 0.1 of a half but once in 100,000 times.
    assert 0.4 < cut < 0.6
    cfg, ids = config(mixup=1.0), np.array([4, 9])
    draws = {
        float(pair_parameters(cfg, ids, 8, seed=seed, epoch=epoch)["mix_lam"][0])
        for seed in range(5)
        for epoch in range(5)
    }
    draws.add(float(pair_parameters(cfg, ids[::-1].copy(), 8, seed=0, epoch=0)["mix_lam"][0]))
    assert len(draws) == 26


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lam_follows_the_beta_distribution(alpha: float) -> None:
    from scipy.stats import beta, kstest

    lam = parameters(4000, mixup=alpha)["mix_lam"][::2]
    # Rounded to 2^-20: the statistic of 4,000 sound draws exceeds 0.036 once in 10,000 times.
    assert kstest(lam.astype(np.float64), beta(alpha, alpha).cdf).statistic < 0.036


def test_lam_of_cutmix_is_the_area_that_is_left() -> None:
    drawn = parameters(300, size=24, cutmix=1.0)
    top, bottom, left, right = drawn["mix_box"].T
    assert (drawn["mix_box"] >= 0).all() and (drawn["mix_box"] <= 24).all()
    area = (bottom - top) * (right - left)
    assert np.allclose(drawn["mix_lam"], 1 - area / 24**2, atol=1e-7)
    assert 0.3 < drawn["mix_lam"].mean() < 0.8


def test_it_is_what_timm_computes() -> None:
    torch.manual_seed(0)
    size, classes, smoothing = 16, 7, 0.1
    images = torch.randn(2, 3, size, size)
    labels = torch.tensor([2, 5])
    lam, box = 0.3, (3, 12, 0, 9)
    blended = mix(images, {"mix_lam": torch.tensor([lam, lam])})
    assert torch.allclose(blended, images * lam + images.flip(0) * (1 - lam), atol=1e-6)

    true_lam = 1 - 9 * 9 / size**2
    batch = {
        "mix_lam": torch.tensor([true_lam, true_lam]),
        "mix_box": torch.tensor([box, box]),
        "label": labels,
    }
    expected = images.clone()
    expected[:, :, 3:12, 0:9] = images.flip(0)[:, :, 3:12, 0:9]
    assert torch.equal(mix(images, batch), expected)
    np.random.seed(0)
    (yl, yh, xl, xh), corrected = cutmix_bbox_and_lam(images.shape, 0.4)
    assert corrected == 1 - (yh - yl) * (xh - xl) / size**2

    logits = torch.randn(2, classes)
    smoothed = mixup_target(labels, classes, true_lam, smoothing)
    ours = cross_entropy(logits, mixed_targets(batch, classes), label_smoothing=smoothing)
    theirs = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_mixing_keeps_channels_last_and_blends_only_what_it_should() -> None:
    images = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    batch = {
        "mix_lam": torch.tensor([0.25, 0.25, 1.0, 1.0]),
        "mix_box": torch.tensor([[0] * 4, [0] * 4, [0] * 4, [0] * 4]),
    }
    mixed = mix(images, batch)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixed[2:], images[2:])
    assert torch.allclose(mixed[0], 0.25 * images[0] + 0.75 * images[1], atol=1e-6)
