"""What one live weight costs in the native runtime, by how often a forward pass uses it."""

from __future__ import annotations

import math

# Measured by `python -m benchmarks.runtime_layers` on one Zen 4 core (docs/runtime.md): a weight of
# a convolution takes so long, and so long more for each vector of 16 pixels of its output map; a
# weight of a Linear layer on one image, whose input is gathered.
_CONVOLUTION, _VECTOR, _GATHERED = 1.1, 0.53, 1.2
_PIXELS = 16


def nanoseconds(uses: float) -> float:
    """Of a weight that one forward pass of one image uses so many times: once for each pixel of
    the output map, or once."""
    if uses <= 1:
        return _GATHERED
    return _CONVOLUTION + _VECTOR * math.ceil(uses / _PIXELS)
