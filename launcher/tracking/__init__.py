"""The record of a run: always `metrics.jsonl` in its folder; W&B and TensorBoard where wanted.

Called on global rank 0 only. Whatever happens to a tracker, training goes on: each kind of failure
is one warning in the log.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import atomic_write
from launcher.folder.results import ReportError, read_run
from launcher.recipe.tracking import TrackingConfig
from launcher.tracking.charts import charts_of
from launcher.tracking.identity import Identity, shown_name
from launcher.tracking.lines import Lines
from launcher.tracking.mode import Mode
from launcher.tracking.tensorboard_run import TensorBoardRun
from launcher.tracking.values import Histogram, json_of, number
from launcher.tracking.wandb_run import WandbRun

__all__ = ["Histogram", "Tracker", "TrackingConfig"]

_log = logging.getLogger("scl.tracking")


class Tracker:
    """Records the metrics of one run, on its own step axis.

    `metrics.jsonl`, one JSON object a line: `step` (optimizer steps), `epoch`, `time` (Unix
    seconds), then the metrics; NaN and infinities, which JSON lacks, become null.

    `resume_step` is the step of the checkpoint the run continues from (0: from the start): what
    was recorded beyond it moves to `metrics.discarded.jsonl`, so that each step is there once.
    `wandb_id` and `wandb_said`, kept in the checkpoint by the caller, make W&B continue the same
    run. `recipe` is the resolved recipe, shown as the run's configuration.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        *,
        run_name: str,
        recipe: dict[str, Any],
        resume_step: int = 0,
        wandb_id: str | None = None,
        wandb_said: Mapping[str, str] | None = None,
    ) -> None:
        self._run_dir, self._run_name = run_dir, run_name
        name = shown_name(run_name, run_dir)
        self._identity = Identity.find(config, name, wandb_id, wandb_said or {})
        self._lines = Lines(run_dir / "metrics.jsonl", resume_step)
        self._wandb = WandbRun(run_dir, config, self._identity, recipe)
        self._board = TensorBoardRun(run_dir, resume_step) if config.tensorboard else None

    @property
    def wandb_id(self) -> str:
        """The W&B id of this run: the one given, or a new one; also where W&B is off."""
        return self._wandb.run_id

    @property
    def wandb_said(self) -> dict[str, str]:
        """What the environment has said of how W&B shows this run."""
        return self._identity.said

    @property
    def wandb_mode(self) -> Mode:
        """Where W&B keeps this run, after all fallbacks."""
        return self._wandb.mode

    @property
    def url(self) -> str | None:
        """The run's page, if W&B is online."""
        return self._wandb.url

    @property
    def sync_command(self) -> str | None:
        """The shell command that uploads this run, all its resumptions included, if offline."""
        if self.wandb_mode != "offline":
            return None
        folders = shlex.quote(str(self._run_dir / "wandb"))
        return f"wandb sync {folders}/offline-run-*-{shlex.quote(self.wandb_id)}"

    def log(self, metrics: Mapping[str, Any], *, step: int, epoch: float) -> None:
        """Record `metrics`, numbers or a `Histogram`, as of `step`.

        Never raises for a failing disk or server.
        """
        plain = {name: _plain(value) for name, value in metrics.items()}
        position = {"step": step, "epoch": float(epoch)}
        self._lines.write({**position, "time": round(time.time(), 3), **plain})
        self._wandb.log({**position, **plain})
        if self._board is not None:
            self._board.log(plain, step)

    def summary(self, values: dict[str, Any]) -> None:
        """Record the outcome of the run, also in `summary.json`; null stands for NaN."""
        try:
            text = json.dumps(json_of(values), indent=2, ensure_ascii=False) + "\n"
            atomic_write(self._run_dir / "summary.json", text)
        except OSError as error:
            _log.warning("cannot write summary.json: %s", error)
        self._wandb.summary(values)

    def charts(self, images: Sequence[Path]) -> None:
        """Give W&B tables and charts of the whole run, as recorded so far, and both `images`."""
        try:
            self._lines.flush()
            run = read_run(self._run_dir)
        except (OSError, ReportError) as error:
            _log.warning("there are no charts of this run: %s", error)
            return
        last = run.metrics[-1] if run.metrics else {}
        position = {key: last[key] for key in ("step", "epoch") if key in last}
        self._wandb.charts(charts_of(run, images), position)
        if self._board is not None:
            self._board.images([path for path in images if path.is_file()], last.get("step", 0))

    def model(
        self, files: Sequence[Path], metadata: dict[str, Any], data: Mapping[str, Any]
    ) -> None:
        """Keep `files`, the model and its report, as an artifact of W&B's named like the run.

        `data` says what it was trained on: its `dataset`, and what tells it from another.
        """
        self._wandb.model(self._run_name, files, json_of(metadata), json_of(data))

    def flush(self) -> None:
        """Make the lines so far survive a crash of the machine: to be called with a checkpoint."""
        self._lines.flush()

    def close(self, exit_code: int = 0) -> None:
        """End the record; any `exit_code` but 0 marks the run as failed."""
        self._lines.close()
        if self._board is not None:
            self._board.close()
        self._wandb.close(exit_code)


def _plain(value: Any) -> Any:
    return value if isinstance(value, Histogram) else number(value)
