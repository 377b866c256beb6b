"""Runs that W&B keeps, as far as a comparison needs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launcher.compare.entry import Entry
from launcher.folder.results import ReportError, Run
from launcher.tracking.mode import resolve_mode

_TIMEOUT_S = 30
# Of long runs W&B sends so many points of a series.
_SAMPLES = 500
_SERIES = ("val/top1", "connections/density", "train/loss", "speed/images_per_s")
_LAYER = "density/"
# What is in W&B's summary only once the run has written its results.
_OUTCOME = "train_seconds"


def read_wandb(path: str) -> Iterator[Entry]:
    """The runs of `entity/project`, oldest first, or the one run `entity/project/run_id`.

    Raises ReportError: not logged in, no answer, no such project or run.
    """
    if resolve_mode("auto") != "online":
        raise ReportError(
            f"There is no folder {path}, and W&B is not asked for a project of that name: log in "
            "with wandb login, or set WANDB_API_KEY (and not WANDB_MODE=offline)."
        )
    try:
        import wandb

        api = wandb.Api(timeout=_TIMEOUT_S)
        one = path.count("/") == 2
        runs = [api.run(path)] if one else list(api.runs(path, order="+created_at", lazy=False))
        entries = [_entry(run) for run in runs]
    # Whatever wandb raises, and it raises much, the user is told in one sentence.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ReportError(
            f"There is no folder {path}, and of W&B it cannot be read: {reason}."
        ) from error
    if not entries:
        raise ReportError(f"There is no folder {path}, and W&B has no run in a project {path}.")
    yield from entries


def _entry(run: Any) -> Entry:
    summary = {key: value for key, value in dict(run.summary).items() if not key.startswith("_")}
    metrics = [
        {"epoch": row["epoch"], name: row[name]}
        for name in _SERIES
        for row in run.history(keys=["epoch", name], samples=_SAMPLES, pandas=False)
    ]
    return Entry(
        name=str(run.name),
        place="/".join(run.path),
        recipe={key: value for key, value in dict(run.config).items() if not key.startswith("_")},
        run=Run(summary=summary if _OUTCOME in summary else {}, metrics=metrics, layers=[]),
        densities={
            key.removeprefix(_LAYER): float(value)
            for key, value in summary.items()
            if key.startswith(_LAYER) and isinstance(value, int | float)
        },
    )
