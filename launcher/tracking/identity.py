"""Which run of W&B's this is, and how it is called there: by the recipe, or by W&B's variables."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.recipe.tracking import TrackingConfig

_VARIABLES = {
    "name": "WANDB_NAME",
    "project": "WANDB_PROJECT",
    "group": "WANDB_RUN_GROUP",
    "notes": "WANDB_NOTES",
    "tags": "WANDB_TAGS",
}


@dataclass(frozen=True)
class Identity:
    """The id of a run and what W&B shows of it; `said` is what the environment said of that.

    A variable wins over the recipe, since it is about one start of it. What it said is kept with
    the run: one that continues is the same without the variables. Tags are added to the recipe's.
    """

    run_id: str
    shown: Mapping[str, Any]
    said: dict[str, str]

    @classmethod
    def find(
        cls, config: TrackingConfig, name: str, run_id: str | None, said: Mapping[str, str]
    ) -> Identity:
        """`name`, `run_id` and `said` are those of the recipe and of the run's former start."""
        values = {key: os.environ.get(variable) for key, variable in _VARIABLES.items()}
        said_now = {**said, **{key: value for key, value in values.items() if value}}
        tags = [tag.strip() for tag in said_now.get("tags", "").split(",") if tag.strip()]
        shown = {
            "name": name,
            "project": config.project,
            "group": config.group,
            "notes": config.notes,
            **said_now,
            "tags": [*dict.fromkeys([*config.tags, *tags])],
        }
        chosen_id = os.environ.get("WANDB_RUN_ID") or run_id or secrets.token_hex(4)
        return cls(chosen_id, shown, said_now)


def shown_name(name: str, folder: Path) -> str:
    """How W&B calls the run `name` in `folder`: runs of one recipe in several folders differ."""
    place = folder.resolve().name
    return place if name in place or not place else f"{name} {place}"
