"""A training as a plain loop with a schedule makes it, for methods that only step."""

from __future__ import annotations

from torch import Tensor, nn

from sclcore import Schedule, Scheduler
from sclcore.driver.optimizer import Driver
from tests.sclcore.nets import mse_step

SCHEDULE = Schedule(lr_warmup=0.1)


def train(
    model: nn.Module,
    optimizer: Driver,
    batches: list[tuple[Tensor, Tensor]],
    steps: range | None = None,
) -> None:
    scheduler = Scheduler(optimizer, SCHEDULE)
    for step in steps or range(len(batches)):
        scheduler.set_progress(step / len(batches))
        mse_step(model, optimizer, batches[step])
