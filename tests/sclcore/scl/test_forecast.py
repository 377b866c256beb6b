"""A forecast from a part of the time, against what the whole of it leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sclcore import SCL, connection_groups
from sclcore.scl.forecast import Moment, forecast

STEPS, MASK_LR = 400, 0.002
REACH = MASK_LR / 0.1 * STEPS


def masks_after(steps: int, lam: float, costs: list[float]) -> dict[str, torch.Tensor]:
    """Mask variables under a gradient that never changes, with weights that stand still."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    [connections, *rest] = connection_groups(model)
    connections["costs"] = costs
    optimizer = SCL([connections, *rest], lr=0.0, lam=lam, mask_lr=MASK_LR)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    for _ in range(steps):
        optimizer.step()
    return {name: m.clone() for name, m in optimizer.mask_variables().items()}


@pytest.mark.parametrize("costs", [[1.0, 1.0], [0.5, 2.0]])
def test_under_a_steady_gradient_it_is_right(costs: list[float]) -> None:
    """Up to the start of momentum, which costs a mask variable nine updates' worth of its way."""
    earlier, now = (Moment(s / STEPS, masks_after(s, 0.2, costs)) for s in (100, 200))
    names = list(now.masks)
    for lam in (0.05, 0.2, 0.6, 1.5):
        shares = forecast(
            earlier,
            now,
            lam=0.2,
            other=lam,
            reach=REACH,
            costs=dict(zip(names, costs, strict=True)),
        )
        actual = masks_after(STEPS, lam, costs)
        for name in names:
            share = float((actual[name] > 0).float().mean())
            assert shares[name] == pytest.approx(share, abs=0.01), (lam, name)
            assert lam > 1 or 0.02 < share < 0.98, "a case that decides something"
