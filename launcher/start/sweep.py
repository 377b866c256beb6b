"""Sweeps: one YAML file says many runs; each is a recipe, a few settings and a seed."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launcher.errors import UsageError
from launcher.recipe.load import load_recipe, read_mapping
from launcher.recipe.problems import phrase
from launcher.recipe.recipe import Recipe

_NAME = r"^[A-Za-z0-9._-]+$"


class SweepRuns(BaseModel):
    """Runs of one recipe: one for each combination of the values in `set`."""

    model_config = ConfigDict(extra="forbid")

    recipe: Path = Field(description="YAML file, relative to the sweep file")
    label: str | None = Field(
        default=None, pattern=_NAME, description="what its runs are called; null: as the recipe"
    )
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="key.sub: value, or a list of values to try; lists multiply out. A value that "
        "is a list itself stands in a list",
    )


class Sweep(BaseModel):
    """A sweep file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=_NAME, description="name of the sweep, and of its group in W&B")
    out: Path | None = Field(
        default=None, description="folder of the runs' folders; null for runs/<name>"
    )
    seeds: list[int] = Field(
        default=[0], min_length=1, description="every combination is trained with each of them"
    )
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="key.sub: value for all runs; their own go before it, and a list is a value",
    )
    runs: list[SweepRuns] = Field(min_length=1, description="what is trained")

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.name


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    recipe: Recipe


def load_sweep(path: Path, runs: Path | None = None) -> Sweep:
    """Read and validate a sweep file; the sweep's folder lies in `runs`, if that is given.

    Raises UsageError with one sentence.
    """
    try:
        sweep = Sweep.model_validate(read_mapping(path, "sweep"))
    except ValidationError as error:
        raise UsageError(f"{path}: {_sentence(error)}") from None
    return sweep.model_copy(update={"out": runs / sweep.folder.name}) if runs else sweep


def plan_sweep(sweep: Sweep, path: Path, overrides: Sequence[str] = ()) -> list[SweepRun]:
    """Every run of the sweep in file `path`, in order, its recipe validated; touches nothing.

    `overrides`, such as `data.path=…`, are for all of them and win over what the file says.

    Seeds come last, so that the first seed of everything is there early.
    Raises UsageError when a recipe refuses its settings or two runs would have one name.
    """
    planned: dict[str, SweepRun] = {}
    for seed in sweep.seeds:
        for runs in sweep.runs:
            for settings, label in _combinations(runs):
                name = f"{label}-seed{seed}"
                run = _plan_run(sweep, path, runs, settings, name, seed, overrides)
                if run.name in planned:
                    raise UsageError(
                        f"{path}: two runs would be called {run.name}: give their entries "
                        "different labels, and list each value and seed once"
                    )
                planned[run.name] = run
    return list(planned.values())


def _plan_run(
    sweep: Sweep,
    path: Path,
    runs: SweepRuns,
    settings: dict[str, Any],
    name: str,
    seed: int,
    more: Sequence[str],
) -> SweepRun:
    fixed = {
        "name": name,
        "run_dir": str(sweep.folder / name),
        "seed": seed,
        "tracking.group": sweep.name,
    }
    set_here = sweep.set.keys() | settings.keys() | {text.partition("=")[0] for text in more}
    if taken := sorted(set_here & fixed.keys()):
        raise UsageError(
            f"{path}: {taken[0]} is not to be set: a sweep names its runs, their folders and group "
            "itself, and takes their seeds from `seeds`"
        )
    overrides = [
        # JSON is YAML, and says every value on one line.
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in (sweep.set | settings | fixed).items()
    ]
    return SweepRun(name, load_recipe(path.parent / runs.recipe, [*overrides, *more]))


def _combinations(runs: SweepRuns) -> list[tuple[dict[str, Any], str]]:
    """Each combination of the values in `set`, with the label that tells it from the others."""
    choices = {k: v if isinstance(v, list) else [v] for k, v in runs.set.items()}
    varied = [key for key, values in choices.items() if len(values) > 1]
    shorts = [key.rpartition(".")[2] for key in varied]
    names = {
        key: short if shorts.count(short) == 1 else key
        for key, short in zip(varied, shorts, strict=True)
    }
    label = runs.label or runs.recipe.stem
    combinations = []
    for values in itertools.product(*choices.values()):
        settings = dict(zip(choices, values, strict=True))
        parts = [label, *(_word(f"{names[key]}{_shown(settings[key])}") for key in varied)]
        combinations.append((settings, "-".join(parts)))
    return combinations


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _word(text: str) -> str:
    """`text` as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_")


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    in_runs = parts[:1] == ["runs"] and len(parts) > 2
    model = SweepRuns if in_runs else Sweep
    if first["type"] == "extra_forbidden":
        valid = list(model.model_fields)
        close = difflib.get_close_matches(parts[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"valid here: {', '.join(valid)}"
        return f"unknown key {'.'.join(parts)!r}; {hint}"
    return phrase(first, model, parts[2] if in_runs else parts[0] if parts else None)
