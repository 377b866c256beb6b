"""The unit step and its proxies."""

from __future__ import annotations

import pytest
import torch

from sclcore.kernels.proxies import PROXIES, get_proxy, unit_step
from tests.sclcore.oracle import slope

# Away from the kinks at 0 and 1, where a difference quotient means nothing.
_POINTS = torch.tensor([-3.0, -0.7, -0.01, 0.01, 0.3, 0.99, 1.01, 2.5], dtype=torch.float64)


def test_unit_step_is_open_at_zero() -> None:
    mask = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 1.0])
    assert unit_step(mask).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("name", PROXIES)
def test_derivative_is_that_of_the_value(name: str) -> None:
    proxy = get_proxy(name)
    h = 1e-6
    quotient = (proxy.value(_POINTS + h) - proxy.value(_POINTS - h)) / (2 * h)
    derivative = proxy.derivative(_POINTS) if proxy.derivative else torch.ones_like(_POINTS)
    # A central difference in float64 with h = 1e-6 is good to about 1e-10.
    torch.testing.assert_close(derivative, quotient, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", PROXIES)
def test_derivative_is_exact_in_the_masks_own_precision(name: str) -> None:
    derivative = get_proxy(name).derivative
    if derivative is None:
        assert name == "identity"
        return
    points = torch.cat([_POINTS, torch.tensor([0.0, 1.0], dtype=torch.float64)])
    assert derivative(points).dtype == torch.float64
    # The textbook's, at the kinks too; only the last bit of an exponential may differ.
    torch.testing.assert_close(derivative(points), slope(name, points), rtol=1e-15, atol=1e-16)
    assert derivative(points.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", PROXIES)
def test_positive_says_the_truth(name: str) -> None:
    proxy = get_proxy(name)
    points = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    derivative = proxy.derivative(points) if proxy.derivative else torch.ones_like(points)
    assert bool((derivative > 0).all()) == proxy.positive
    assert bool((derivative >= 0).all())


def test_the_default_start_can_move() -> None:
    """Every mask begins at 1; a proxy flat there would never make a first move."""
    for proxy in PROXIES.values():
        one = torch.ones(1)
        assert proxy.derivative is None or float(proxy.derivative(one)) > 0, proxy.name


def test_unknown_proxy_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown proxy 'sigmoid'.*identity.*softplus.*clipped"):
        get_proxy("sigmoid")
