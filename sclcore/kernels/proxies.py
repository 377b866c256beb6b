"""The unit step of a mask variable and the proxies that stand in for its derivative.

A connection is live when its mask variable m is positive: H(m) = 1[m > 0]. H has no useful
derivative, so the straight-through estimator trains m with that of a proxy φ. The principle of
Tang et al. (arXiv 2201.05020, section on the STE) is that φ' must be positive everywhere: only then
does every mask variable keep moving until it reaches its minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAKY_SLOPE = 0.1


def unit_step(mask: Tensor) -> Tensor:
    """H(m): a boolean tensor of the shape of `mask`, true where the connection is live."""
    return mask > 0


@dataclass(frozen=True)
class Proxy:
    """A differentiable stand-in for the unit step.

    `derivative` maps m to φ'(m) (same shape); None means φ' = 1 everywhere, which costs nothing.
    `positive` says whether φ' > 0 everywhere, as the theory asks.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor] | None
    positive: bool


def _leaky_relu_derivative(mask: Tensor) -> Tensor:
    return torch.full_like(mask, LEAKY_SLOPE).masked_fill_(mask > 0, 1.0)


def _relu_derivative(mask: Tensor) -> Tensor:
    return (mask > 0).to(mask.dtype)


def _clipped_derivative(mask: Tensor) -> Tensor:
    # Closed at 1, the customary initial value: open there, no mask would ever make a first move.
    return ((mask > 0) & (mask <= 1)).to(mask.dtype)


PROXIES: dict[str, Proxy] = {
    proxy.name: proxy
    for proxy in (
        Proxy("identity", lambda m: m, None, positive=True),
        Proxy(
            "leaky_relu",
            lambda m: torch.nn.functional.leaky_relu(m, LEAKY_SLOPE),
            _leaky_relu_derivative,
            positive=True,
        ),
        Proxy("softplus", torch.nn.functional.softplus, torch.sigmoid, positive=True),
        # The next two break the principle; they are here to show what happens then.
        Proxy("relu", torch.relu, _relu_derivative, positive=False),
        Proxy("clipped", lambda m: m.clamp(0, 1), _clipped_derivative, positive=False),
    )
}


def get_proxy(name: str) -> Proxy:
    """The proxy called `name`; ValueError lists the known ones."""
    try:
        return PROXIES[name]
    except KeyError:
        known = ", ".join(PROXIES)
        raise ValueError(f"unknown proxy {name!r}: choose one of {known}") from None
