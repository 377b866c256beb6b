"""From the beginning of a training: how many connections it would leave in the end, for any λ.

While masks are learned, a mask variable falls by reach · (ĝ + λ · c) per unit of travel, the share
of their whole way that lies behind (`Schedule.mask_travel`). If ĝ stayed at its recent mean, a mask
variable would end, under another λ', at

    m + (1 - travel) · (m - m') / (travel - travel') - reach · (λ' - λ) · c

where m' is what it was at travel'. ĝ does drift, since what dies changes what the others are needed
for; docs/lambda.md says how far that is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """The mask variables by name, at a travel in [0, 1)."""

    travel: float
    masks: Mapping[str, Tensor]


def forecast(
    earlier: Moment,
    now: Moment,
    *,
    lam: float,
    other: float,
    reach: float,
    costs: Mapping[str, float],
) -> dict[str, float]:
    """The share of each tensor's connections that would be live at the end under λ `other`.

    Both moments are of one training under `lam`; for proxy identity, whose derivative is 1.
    """
    shares = {}
    for name, mask in now.masks.items():
        speed = (mask - earlier.masks[name]) / (now.travel - earlier.travel)
        shift = reach * (other - lam) * costs[name]
        end = mask + (1 - now.travel) * speed - shift
        shares[name] = float((end > 0).float().mean())
    return shares
