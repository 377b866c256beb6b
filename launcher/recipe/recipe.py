"""Recipes: one YAML file says everything about a run; it is typed, and validated once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data.config import DataConfig
from launcher.recipe.checkpoint import CheckpointConfig
from launcher.recipe.distill import DistillConfig
from launcher.recipe.engine import EngineConfig
from launcher.recipe.init import AUTO, UNIFORM, InitConfig
from launcher.recipe.method import MethodConfig, OptimConfig
from launcher.recipe.model import ModelConfig
from launcher.recipe.tracking import TrackingConfig
from sclcore.driver.method import Method
from sclcore.registry import find_method
from sclcore.schedule import Schedule

# Where a run may differ from the checkpoint it continues: nothing here changes what is learned.
_FREE_ON_RESUME = ("name", "run_dir", "tracking", "checkpoint", "engine", "data.path")
_FREE_DATA_KEYS = (
    *("data.workers", "data.prefetch", "data.eval_batch_size"),
    *("data.cache_dir", "data.cache_gb", "data.fetch_ahead", "data.fetch_timeout_s"),
    *("data.retries", "data.retry_wait_s", "data.max_corrupt_fraction"),
)
NOT_SET = "not set"


class Recipe(BaseModel):
    """A run. `base: other.yaml` at the top of a file takes everything else from there."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="name of the run")
    run_dir: Path | None = Field(
        default=None, description="where everything is written; null for runs/<name>"
    )
    seed: int = Field(
        default=0, ge=0, description="decides initial weights, order and augmentation"
    )
    model: ModelConfig
    init: InitConfig = Field(default_factory=InitConfig)
    data: DataConfig
    method: MethodConfig
    optim: OptimConfig
    distill: DistillConfig | None = Field(
        default=None, description="a teacher to learn from; null: labels alone"
    )
    schedule: Schedule = Field(default_factory=Schedule)  # type: ignore[arg-type]
    engine: EngineConfig = Field(default_factory=EngineConfig)  # type: ignore[arg-type]
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)  # type: ignore[arg-type]
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _method_fits_engine(self) -> Self:
        stages = self.method.zero_stages
        if self.engine.zero_stage not in stages:
            raise ValueError(
                f"method {self.method.name} needs whole tensors on every rank: engine.zero_stage "
                f"must be {' or '.join(map(str, stages))}, not {self.engine.zero_stage}"
            )
        precisions = self.method.precisions
        if self.engine.precision not in precisions:
            raise ValueError(
                f"method {self.method.name} writes other weights before each forward pass, which "
                "a copy of the model in lower precision would not see: engine.precision must be "
                f"{' or '.join(precisions)}, not {self.engine.precision}"
            )
        if self.optim.ema_decay is not None and len(precisions) < len(Method.precisions):
            raise ValueError(
                f"method {self.method.name} writes other weights before each forward pass, so "
                "that those after an update are not the network: leave optim.ema_decay out"
            )
        if self.optim.layer_decay is not None and not self.method.layerwise:
            raise ValueError(
                f"method {self.method.name} has one learning rate for all layers: leave "
                "optim.layer_decay out"
            )
        return self

    @property
    def folder(self) -> Path:
        return self.run_dir or Path("runs") / self.name

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, every default filled in."""
        return self.model_dump(mode="json")


def differences(saved: dict[str, Any], recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """The settings that make a checkpoint's recipe another run than `recipe`: key, ours, theirs.

    A setting that one of the two has not at all is `NOT_SET` there.
    """
    ours, theirs = (
        {key: value for key, value in flatten(values) if value != {}}
        for values in (recipe.as_dict(), _completed(saved))
    )
    found = []
    # A block of another name has other keys: the name is what differs.
    for key in sorted(ours.keys() | theirs.keys(), key=lambda k: (not k.endswith(".name"), k)):
        free = key in _FREE_DATA_KEYS or any(
            key == prefix or key.startswith(f"{prefix}.") for prefix in _FREE_ON_RESUME
        )
        # What `auto` was before it existed: masks of a run that continues come from its checkpoint.
        if key == "init.masks" and (ours.get(key), theirs.get(key)) == (AUTO, UNIFORM):
            continue
        # Precision decides the arithmetic, though it belongs to the engine.
        if (not free or key == "engine.precision") and ours.get(key) != theirs.get(key):
            found.append((key, ours.get(key, NOT_SET), theirs.get(key, NOT_SET)))
    return found


def resume_difference(
    saved: dict[str, Any], recipe: Recipe, changing: Collection[str] = ()
) -> str | None:
    """The first setting that makes a checkpoint's recipe another run, as a phrase; None if none.

    The keys `changing` may differ.
    """
    for key, ours, theirs in differences(saved, recipe):
        if key in changing:
            continue
        here, there = (v if v == NOT_SET else repr(v) for v in (ours, theirs))
        return f"{key} is {here} here and {there} there"
    return None


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """`saved` with what keys that did not exist yet were when it was written."""
    try:
        method = saved["method"]
        was = find_method(method["name"]).as_it_was
        return Recipe.model_validate({**saved, "method": {**was, **method}}).as_dict()
    except (KeyError, TypeError, ValueError):
        return saved


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
