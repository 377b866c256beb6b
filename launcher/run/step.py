"""One update of the network, from one global batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from launcher.run.course import Course
from launcher.run.engine import apply_update
from launcher.run.learner import Learner
from launcher.run.progress import Progress


class Watcher(Protocol):
    """Who is told of an update while it is made."""

    def before_step(self, step: int) -> None: ...

    def after_micro_batch(self, loss: Tensor, logits: Tensor, batch: dict[str, Tensor]) -> None: ...

    def after_step(self, step: int, *, grad_norm: float, data_wait: float) -> None: ...


def train_step(
    learner: Learner,
    course: Course,
    batches: Iterator[dict[str, Tensor]],
    accumulation: int,
    progress: Progress,
    watcher: Watcher,
) -> None:
    """One update from one global batch, in `accumulation` micro-batches. Collective."""
    began, data_wait = time.perf_counter(), 0.0
    if course.set(progress):
        learner.optimizer_state.write_model()
    watcher.before_step(progress.step)
    learner.before_update()
    for micro_step in range(accumulation):
        waiting = time.perf_counter()
        batch = {k: v.to(learner.device, non_blocking=True) for k, v in next(batches).items()}
        data_wait += time.perf_counter() - waiting
        logits = learner.forward(batch)
        loss = learner.loss(logits, batch)
        learner.engine.backward(loss)
        learner.pass_again(batch, loss, share=1 / accumulation)
        watcher.after_micro_batch(loss, logits, batch)
        if micro_step + 1 < accumulation:
            learner.engine.step()
    grad_norm = apply_update(learner.engine)
    learner.after_update()
    progress.step += 1
    progress.seconds += time.perf_counter() - began
    watcher.after_step(progress.step, grad_norm=grad_norm, data_wait=data_wait)
