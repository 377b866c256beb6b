"""The memory of a batch: where its images are written, and how they look from outside."""

from __future__ import annotations

import math

import torch
from torch.utils.data import get_worker_info


def empty_images(
    count: int, size: int, channels: int, room: torch.Tensor | None = None
) -> tuple[torch.Tensor, bool]:
    """Return uint8 [count, size, size, channels] to write to, and whether it lies in `room`.

    Where `room`, uint8 [bytes], is none or too small, it is fresh: in a worker, shared with the
    main process.
    """
    shape = (count, size, size, channels)
    needed = math.prod(shape)
    if room is not None and len(room) >= needed:
        return room[:needed].view(shape), True
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8), False
    storage = torch.UntypedStorage._new_shared(needed)
    return torch.tensor([], dtype=torch.uint8).set_(storage).view(shape), False


def channels_first(images: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C] as [B, C, H, W] in the same memory."""
    if images.shape[3] == 1:
        # One channel is first as well as last: strides that leave no doubt are the usual ones.
        return images.reshape(images.shape[0], 1, *images.shape[1:3])
    return images.permute(0, 3, 1, 2)
