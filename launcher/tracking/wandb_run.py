"""A W&B run that falls back from online to offline to nothing, with a warning each time."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher.recipe.tracking import TrackingConfig
from launcher.tracking.charts import Charts
from launcher.tracking.identity import Identity
from launcher.tracking.mode import Mode, resolve_mode
from launcher.tracking.series import SERIES
from launcher.tracking.values import Histogram

_log = logging.getLogger("scl.tracking")

# How long an unreachable W&B server may hold up the start and the end of a run.
INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 120.0

_WORDS: dict[Mode, str] = {"offline": "offline", "off": "with metrics.jsonl alone"}


class WandbRun:
    """`mode`, `url` and `run_id` are those after all fallbacks. Nothing here raises.

    W&B starts in the background: importing it and waiting for its service takes seconds in which a
    run can make its first updates. Whatever needs it waits for it.
    """

    def __init__(
        self, run_dir: Path, config: TrackingConfig, identity: Identity, recipe: dict[str, Any]
    ) -> None:
        self._run: Any = None
        self._mode: Mode = resolve_mode(config.wandb)
        self._url: str | None = None
        self._run_id = identity.run_id

        def start() -> None:
            if self._mode == "online":
                self._start(run_dir, identity, recipe, fallback="offline")
            if self._mode == "offline":
                self._start(run_dir, identity, recipe, fallback="off")

        self._starting = threading.Thread(target=start, name="start W&B", daemon=True)
        self._starting.start()

    @property
    def mode(self) -> Mode:
        self._starting.join()
        return self._mode

    @property
    def url(self) -> str | None:
        self._starting.join()
        return self._url

    @property
    def run_id(self) -> str:
        if os.environ.get("WANDB_SWEEP_ID"):
            # In a sweep of W&B's, its agent decides.
            self._starting.join()
        return self._run_id

    def _start(
        self, run_dir: Path, identity: Identity, recipe: dict[str, Any], *, fallback: Mode
    ) -> None:
        wandb: Any = None
        try:
            # What is to be uploaded later belongs to the run, not to the home of who started it.
            os.environ.setdefault("WANDB_DATA_DIR", str(run_dir.resolve() / "wandb"))
            # Here because it takes a second, and because where it does not work, training does.
            import wandb

            self._run = wandb.init(
                mode=self._mode,  # pyright: ignore[reportArgumentType]
                id=identity.run_id,
                resume="allow",
                dir=run_dir,
                config=recipe,
                **identity.shown,
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    init_timeout=INIT_TIMEOUT_S,
                    finish_timeout=FINISH_TIMEOUT_S,
                ),
            )
            _define_axes(self._run)
            self._run_id = self._run.id
            self._url = self._run.url if self._mode == "online" else None
        except Exception as error:
            _log.warning(
                "W&B cannot start %s (%s); going on %s",
                self._mode,
                _one_line(error),
                _WORDS[fallback],
            )
            self._run, self._mode = None, fallback
            if wandb is not None:
                # Its background service goes on holding the id of a run that failed to start.
                _quietly(wandb.teardown)

    def log(self, values: Mapping[str, Any]) -> None:
        self._guard("log", lambda run: run.log({k: _value(v) for k, v in values.items()}))

    def summary(self, values: dict[str, Any]) -> None:
        self._guard("store the summary", lambda run: run.summary.update(values))

    def charts(self, charts: Charts, position: Mapping[str, float]) -> None:
        """Tables, the scatter of accuracy over density, pictures; as of `position`."""

        def log(run: Any) -> None:
            import wandb

            logged: dict[str, Any] = {name: wandb.Image(str(p)) for name, p in charts.images}
            for name, columns, rows in charts.tables:
                logged[name] = wandb.Table(columns=[*columns], data=rows)
            for (name, columns, rows), x, y, title in charts.scatters:
                table = wandb.Table(columns=[*columns], data=rows)
                logged[name] = wandb.plot.scatter(table, x, y, title=title)
            run.log({**position, **logged})

        self._try("draw its charts", log)

    def model(
        self, name: str, files: Sequence[Path], metadata: dict[str, Any], data: Mapping[str, Any]
    ) -> None:
        """The sparse model and its report as an artifact, made from the data set `data`.

        Lineage from a data set is known to W&B's server alone; offline, `metadata` has to do.
        """

        def log(run: Any) -> None:
            import wandb

            if self.mode == "online":
                self._try("note the data set", lambda run: run.use_artifact(_data_set(data)))
            artifact = wandb.Artifact(name, type="model", metadata={**metadata, "data": dict(data)})
            for path in files:
                # Not copied into a cache of W&B's: it stays in the run's folder, and as it is.
                artifact.add_file(str(path.resolve()), policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

        self._try("keep the model", log)

    def close(self, exit_code: int) -> None:
        self._guard("finish", lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _guard(self, what: str, call: Callable[[Any], Any]) -> None:
        """Make a call that the record needs: if it fails, W&B gets nothing more."""
        if not self._attempt(call, f"W&B cannot {what} (%s); going on without it"):
            self._run = None

    def _try(self, what: str, call: Callable[[Any], Any]) -> None:
        """Make a call that only adds to the record: if it fails, the rest goes on."""
        self._attempt(call, f"W&B cannot {what} (%s)")

    def _attempt(self, call: Callable[[Any], Any], warning: str) -> bool:
        self._starting.join()
        try:
            if self._run is not None:
                call(self._run)
            return True
        except Exception as error:
            _log.warning(warning, _one_line(error))
            return False


def _define_axes(run: Any) -> None:
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    for series in SERIES:
        if series.best is not None:
            run.define_metric(series.name, step_metric="step", summary=f"{series.best},last")


def _value(value: Any) -> Any:
    if not isinstance(value, Histogram):
        return value
    import wandb

    return wandb.Histogram(np_histogram=(np.array(value.counts), np.array(value.edges)))


def _data_set(data: Mapping[str, Any]) -> Any:
    """A few bytes that stand for a set of shards: the same set is the same version."""
    import wandb

    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in str(data["dataset"]))
    artifact = wandb.Artifact(name, type="dataset", metadata=dict(data))
    with artifact.new_file("data.json") as file:
        json.dump(dict(data), file, indent=2)
    return artifact


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _quietly(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        _log.debug("ignored: %s", error)
