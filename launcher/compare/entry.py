"""One run among those compared."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launcher.folder.results import Run, is_number, latest
from launcher.recipe.recipe import flatten
from sclcore.registry import parse_method

_EPOCHS = "optim.epochs"


@dataclass(frozen=True, eq=False)
class Entry:
    """One run; without a recipe, `recipe` is empty. `densities`: layer → live share.

    `data` tells its data from others: the fingerprint of the shards, else their path.
    `milliseconds` is how long its network takes on this machine, where that was asked for, and
    `unmeasured` why it is not known.
    """

    name: str
    place: str
    recipe: dict[str, Any]
    run: Run
    densities: dict[str, float]
    data: str | None = None
    milliseconds: float | None = None
    unmeasured: str = ""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe, flat: `method.lam` → 0.28."""
        return dict(flatten(self.recipe))

    @property
    def finished(self) -> bool:
        """Whether the run has written its results."""
        return bool(self.run.summary)

    @property
    def method(self) -> str:
        return str(self.run.summary.get("method") or self.settings.get("method.name") or "unknown")

    @property
    def seed(self) -> int | None:
        return self.recipe.get("seed")

    def value(self, key: str) -> float | None:
        """What the summary says of `key`, of an unfinished run the latest; None if nothing.

        `images_per_s` is the median over the intervals that were logged, `cost` what all epochs of
        the recipe cost, in epochs of the dense network.
        """
        if key == "milliseconds":
            return self.milliseconds
        if key == "cost":
            return self._cost()
        if key == "images_per_s":
            rates = self.run.series("speed/images_per_s")[1]
            return statistics.median(rates) if rates else None
        value = latest(self.run).get(key)
        return float(value) if is_number(value) else None

    def _cost(self) -> float | None:
        epochs = self.settings.get(_EPOCHS)
        try:
            method = parse_method(self.recipe.get("method"))
        except ValueError:
            # Of another version, or of a package that is not installed here.
            return None
        return float(epochs) * method.update_cost if is_number(epochs) else None

    def state(self) -> str:
        """`finished`, or how far the run has come."""
        if self.finished:
            return "finished"
        lines = self.run.metrics
        epoch = max((line["epoch"] for line in lines if is_number(line.get("epoch"))), default=0)
        epochs = self.settings.get(_EPOCHS)
        return f"epoch {epoch:.4g} of {epochs}" if epochs else f"epoch {epoch:.4g}"
