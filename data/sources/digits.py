"""Scikit-learn's handwritten digits: in every installation, so that the demo downloads nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from data.sources.source import ArrayReader, Reader, Source, held_out


def digits() -> Source:
    """Return scikit-learn's 1,797 8×8 grey digits; always the same 1,437 for training, 360 for val.

    The values 0-16 are scaled to 0-255.
    """
    stored: Any = load_digits()
    labels = stored.target
    pixels = np.rint(stored.images * (255 / 16)).astype(np.uint8)
    train, val = held_out(labels, 0.2)
    splits: dict[str, Reader] = {
        "train": ArrayReader(pixels[train], labels[train]),
        "val": ArrayReader(pixels[val], labels[val]),
    }
    return Source("digits", "digits", [str(digit) for digit in range(10)], splits)
