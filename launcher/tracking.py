"""The record of a run: always `metrics.jsonl` in its folder, and W&B where wanted.

Called on global rank 0 only. Whatever happens to a tracker, training goes on: each kind of failure
is one warning in the log.
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import secrets
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from launcher.files import atomic_write

_log = logging.getLogger("scl.tracking")

# How long an unreachable W&B server may hold up the start and the end of a run.
INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 120.0

# The public server's names, of old and as of wandb 0.31.
_PUBLIC_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")

Mode = Literal["online", "offline", "off"]
_WANDB_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "off",
}


class TrackingConfig(BaseModel, extra="forbid"):
    """What is recorded of a run, and where."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        default="auto",
        description=(
            "Where W&B keeps the run. 'auto': WANDB_MODE from the environment if set, else online "
            "if an API key is at hand (WANDB_API_KEY or netrc), else offline, to be synchronised "
            "later. Never asks. metrics.jsonl is written in any case."
        ),
    )
    project: str = Field(default="scl", description="W&B project.")
    group: str | None = Field(default=None, description="W&B group: runs to be seen together.")
    tags: list[str] = Field(default=[], description="W&B tags of the run.")
    notes: str | None = Field(default=None, description="A remark that W&B shows with the run.")
    log_every: int = Field(default=10, ge=1, description="Log every so many optimizer steps.")


class Tracker:
    """Records the metrics of one run, on its own step axis.

    `metrics.jsonl`, one JSON object a line: `step` (optimizer steps), `epoch`, `time` (Unix
    seconds), then the metrics; NaN and infinities, which JSON lacks, become null.

    `resume_step` is the step of the checkpoint the run continues from (0: from the start): what
    was recorded beyond it moves to `metrics.discarded.jsonl`, so that each step is there once.
    `wandb_id`, kept in the checkpoint by the caller, makes W&B continue the same run. `recipe` is
    the resolved recipe, shown as the run's configuration.
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
    ) -> None:
        self._run_dir = run_dir
        self._id = wandb_id or secrets.token_hex(4)
        self._lines = _Lines(run_dir / "metrics.jsonl", resume_step)
        self._wandb = _Wandb(run_dir, config, run_name, recipe, self._id)

    @property
    def wandb_id(self) -> str:
        """The W&B id of this run: the one given, or a new one; also where W&B is off."""
        return self._id

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
        return f"wandb sync {folders}/offline-run-*-{self._id}"

    def log(self, metrics: Mapping[str, float], *, step: int, epoch: float) -> None:
        """Record `metrics` as of `step`. Never raises for a failing disk or server."""
        plain = {name: _number(value) for name, value in metrics.items()}
        position = {"step": step, "epoch": float(epoch)}
        self._lines.write({**position, "time": round(time.time(), 3), **plain})
        self._wandb.log({**position, **plain})

    def summary(self, values: dict[str, Any]) -> None:
        """Record the outcome of the run, also in `summary.json`; null stands for NaN."""
        try:
            text = json.dumps(_json(values), indent=2, ensure_ascii=False) + "\n"
            atomic_write(self._run_dir / "summary.json", text)
        except OSError as error:
            _log.warning("cannot write summary.json: %s", error)
        self._wandb.summary(values)

    def flush(self) -> None:
        """Make the lines so far survive a crash of the machine: to be called with a checkpoint."""
        self._lines.flush()

    def close(self, exit_code: int = 0) -> None:
        """End the record; any `exit_code` but 0 marks the run as failed."""
        self._lines.close()
        self._wandb.close(exit_code)


class _Lines:
    """`metrics.jsonl`, appended to line by line, each handed to the system at once."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        self._warned = False
        self._torn = False
        path.parent.mkdir(parents=True, exist_ok=True)
        _rewind(path, resume_step)
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(_json(record), ensure_ascii=False).encode() + b"\n"
        # A line that a full disk cut short ends here, so that it spoils no other.
        data = b"\n" + line if self._torn else line
        try:
            self._torn = self._file.write(data) != len(data)
        except OSError as error:
            self._torn = True
            self._warn(error)

    def flush(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        if not self._file.closed:
            self.flush()
            self._file.close()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            _log.warning("cannot write %s, metrics are being lost: %s", self._path, error)
            self._warned = True


def _rewind(path: Path, resume_step: int) -> None:
    """Move the lines past `resume_step`, and what a kill cut short, out of the way.

    Killed between the two writes, the next start moves them again: some are then in the discarded
    file twice, which beats not at all.
    """
    if not path.exists():
        return
    kept, discarded = [], []
    for line in filter(None, path.read_bytes().split(b"\n")):
        step = _step_of(line)
        if step is None:
            torn = json.dumps({"unreadable": line.decode(errors="replace")})
            discarded.append(torn.encode())
        else:
            (discarded if step > resume_step or resume_step == 0 else kept).append(line)
    if not discarded:
        return
    with path.with_name("metrics.discarded.jsonl").open("ab") as file:
        file.writelines(line + b"\n" for line in discarded)
        file.flush()
        os.fsync(file.fileno())
    atomic_write(path, b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class _Wandb:
    """A W&B run that falls back from online to offline to nothing, with a warning each time."""

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        run_name: str,
        recipe: dict[str, Any],
        run_id: str,
    ) -> None:
        self._run: Any = None
        self.mode: Mode = _resolve_mode(config.wandb)
        self.url: str | None = None
        if self.mode == "online":
            self._start(run_dir, config, run_name, recipe, run_id, fallback="offline")
        if self.mode == "offline":
            self._start(run_dir, config, run_name, recipe, run_id, fallback="off")

    def _start(
        self,
        run_dir: Path,
        config: TrackingConfig,
        run_name: str,
        recipe: dict[str, Any],
        run_id: str,
        *,
        fallback: Mode,
    ) -> None:
        wandb: Any = None
        try:
            # Here because it takes a second, and because where it does not work, training does.
            import wandb

            self._run = wandb.init(
                mode=self.mode,  # pyright: ignore[reportArgumentType]
                id=run_id,
                resume="allow",
                dir=run_dir,
                name=run_name,
                config=recipe,
                project=config.project,
                group=config.group,
                tags=config.tags,
                notes=config.notes,
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    init_timeout=INIT_TIMEOUT_S,
                    finish_timeout=FINISH_TIMEOUT_S,
                ),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
            self.url = self._run.url if self.mode == "online" else None
        except Exception as error:
            _log.warning(
                "W&B cannot start %s (%s); going on %s",
                self.mode,
                _one_line(error),
                _WORDS[fallback],
            )
            self._run, self.mode = None, fallback
            if wandb is not None:
                # Its background service goes on holding the id of a run that failed to start.
                _quietly(wandb.teardown)

    def log(self, values: dict[str, Any]) -> None:
        self._guard("log", lambda run: run.log(values))

    def summary(self, values: dict[str, Any]) -> None:
        self._guard("store the summary", lambda run: run.summary.update(values))

    def close(self, exit_code: int) -> None:
        self._guard("finish", lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _guard(self, what: str, call: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            _log.warning("W&B cannot %s (%s); going on without it", what, _one_line(error))
            self._run = None


_WORDS: dict[Mode, str] = {"offline": "offline", "off": "with metrics.jsonl alone"}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _quietly(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:
        _log.debug("ignored: %s", error)


def _resolve_mode(wanted: Literal["auto", "online", "offline", "off"]) -> Mode:
    """The mode to start in. Online needs a key: without one, W&B would ask the terminal for it."""
    if wanted == "auto":
        from_environment = os.environ.get("WANDB_MODE", "")
        mode = _WANDB_MODES.get(from_environment)
        if from_environment and mode is None:
            _log.warning("WANDB_MODE=%s is not a mode; ignored", from_environment)
        if mode is None:
            return "online" if _has_credentials() else "offline"
    else:
        mode = wanted
    if mode == "online" and not _has_credentials():
        _log.warning(
            "W&B is to be online, but there is no API key in WANDB_API_KEY or netrc; going on "
            "offline"
        )
        return "offline"
    return mode


def _has_credentials() -> bool:
    """Whether W&B would find credentials by itself; the key itself is not kept anywhere."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(server).netloc,) if server else _PUBLIC_HOSTS
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not path.exists():
        return False
    try:
        known = netrc.netrc(path)
        return any(known.authenticators(host) for host in hosts)
    except (OSError, netrc.NetrcParseError) as error:
        _log.warning("cannot read %s: %s", path, error)
        return False


def _number(value: Any) -> Any:
    """A Python number for whatever counts as one (NumPy's, a tensor of one element)."""
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def _json(value: Any) -> Any:
    """`value` in terms of what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    plain = _number(value)
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
