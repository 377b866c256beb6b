"""Mixup and CutMix of pairs: neighbours in the epoch's order, whoever reads them.

Positions 2k and 2k + 1 of the order are a pair and are mixed with each other, as timm's mode
"pair" does. What they get is a function of (seed, epoch, the two ids), so that the number of
ranks, accumulation and resuming do not change it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from data.config import DataConfig

# Beta's inverse differs in its last bits between versions of scipy; these many are the same.
_LAM_STEPS = 2**20
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Tensors = dict[str, torch.Tensor]


def pair_parameters(
    config: DataConfig, ids: np.ndarray, size: int, *, seed: int, epoch: int
) -> Tensors:
    """Draw λ and, where CutMix may come, boxes for the pairs of a micro-batch.

    `ids` are its sample ids, int64 [B], B even; `size` is the side of its images in pixels.

    `mix_lam`, float32 [B], is the share of a sample's own label, equal within a pair. With `cutmix`
    there is also `mix_box`, int64 [B, 4]: top, bottom, left and right of what comes from the
    partner, all 0 for pairs that are blended.
    """
    draws = _uniform(seed, epoch, ids.reshape(-1, 2))
    cut = np.full(len(draws), config.cutmix > 0)
    if config.cutmix > 0 and config.mixup > 0:
        cut = draws[:, 1] < 0.5
    lam = np.where(
        cut,
        _beta(config.cutmix or config.mixup, draws[:, 0]),
        _beta(config.mixup or config.cutmix, draws[:, 0]),
    )
    if not cut.any() and not config.cutmix:
        return {"mix_lam": _for_both(lam.astype(np.float32))}
    box = np.where(cut[:, None], _boxes(lam, size, draws[:, 2:]), 0)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    # The border may cut a box: λ is what is really left.
    lam = np.where(cut, 1 - area / size**2, lam)
    return {"mix_lam": _for_both(lam.astype(np.float32)), "mix_box": _for_both(box)}


def mix(images: torch.Tensor, batch: Tensors) -> torch.Tensor:
    """Mix the pairs of normalised images, float [B, C, H, W], by the parameters in `batch`."""
    partners = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    own = batch["mix_lam"].to(images.dtype)[:, None, None, None]
    if "mix_box" in batch:
        top, bottom, left, right = batch["mix_box"][:, :, None].unbind(1)
        rows = torch.arange(images.shape[2], device=images.device)
        columns = torch.arange(images.shape[3], device=images.device)
        high = ((rows >= top) & (rows < bottom))[:, :, None]
        wide = ((columns >= left) & (columns < right))[:, None, :]
        is_cut = (bottom > top)[:, :, None, None]
        own = torch.where(is_cut, 1 - (high & wide)[:, None].to(own.dtype), own)
    # Exact at 0 and 1: what is not mixed stays what it was, bit for bit.
    return torch.lerp(partners, images, own)


def mixed_targets(batch: Tensors, classes: int) -> torch.Tensor:
    """Return the labels of mixed images, float32 [B, classes], rows adding up to 1.

    Label smoothing may be applied to them afterwards: it is linear, so this is the same as mixing
    smoothed labels, which is what timm does.
    """
    own = torch.nn.functional.one_hot(batch["label"], classes).to(torch.float32)
    partners = own.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    lam = batch["mix_lam"][:, None]
    return own * lam + partners * (1 - lam)


def _for_both(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.repeat(values, 2, axis=0))


def _beta(alpha: float, uniform: np.ndarray) -> np.ndarray:
    """Numbers of the Beta(α, α) distribution, by its inverse: no generator, no rejection."""
    # Imported here: only mixing needs it.
    from scipy.special import betaincinv

    return np.round(betaincinv(alpha, alpha, uniform) * _LAM_STEPS) / _LAM_STEPS


def _boxes(lam: np.ndarray, size: int, uniform: np.ndarray) -> np.ndarray:
    """timm's rand_bbox for squares: int64 [P, 4], centres anywhere, cut at the border."""
    side = (size * np.sqrt(1 - lam)).astype(np.int64)[:, None]
    centre = (uniform * size).astype(np.int64)
    first = np.clip(centre - side // 2, 0, size)
    last = np.clip(centre + (side + 1) // 2, 0, size)
    return np.stack([first[:, 0], last[:, 0], first[:, 1], last[:, 1]], axis=1)


def _uniform(seed: int, epoch: int, pairs: np.ndarray) -> np.ndarray:
    """Four numbers in (0, 1) for each pair of ids, float64 [P, 4]: SplitMix64 as a hash."""
    state = np.zeros(len(pairs), np.uint64)
    for word in (seed, epoch, pairs[:, 0], pairs[:, 1]):
        state = _scramble(state + _GOLDEN + np.asarray(word).astype(np.uint64))
    counters = np.arange(1, 5, dtype=np.uint64) * _GOLDEN
    bits = _scramble(state[:, None] + counters) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) / 2**53


def _scramble(state: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014); uint64 wraps around."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
