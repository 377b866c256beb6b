"""What a run folder says: its summary, metrics and layers, and how their numbers are written."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from launcher.errors import UserError

Course = tuple[list[float], list[float]]
"""(epochs, values) of one metric."""


# More than any line has.
_TAIL_BYTES = 65_536
_FILES = ("metrics.jsonl", "summary.json", "layers.csv")


class ReportError(UserError):
    """Why a folder cannot be shown as a run."""


@dataclass(frozen=True)
class Layer:
    """One layer's connections (counts) and MACs (of one sample)."""

    name: str
    connections: int
    live: int
    macs: float
    macs_dense: float

    @property
    def density(self) -> float:
        """Share of the connections that live, 0 to 1."""
        return self.live / self.connections if self.connections else 1.0


@dataclass(frozen=True)
class Run:
    """What a run folder says; each part may be empty while the run is young."""

    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    layers: list[Layer]

    def series(self, name: str) -> Course:
        """(epochs, values) of metric `name`, without the lines that lack it."""
        points = [
            (float(line["epoch"]), float(line[name]))
            for line in self.metrics
            if is_number(line.get(name)) and is_number(line.get("epoch"))
        ]
        return [epoch for epoch, _ in points], [value for _, value in points]


def is_run_folder(folder: Path) -> bool:
    """Whether a run has written into `folder`."""
    return any((folder / name).is_file() for name in _FILES)


def read_run(run_dir: Path) -> Run:
    """Read a run folder, finished or not. Raises ReportError if it is none or unreadable."""
    if not run_dir.is_dir():
        raise ReportError(f"There is no run folder {run_dir}.")
    if not is_run_folder(run_dir):
        raise ReportError(f"{run_dir} is no run folder: it has none of {', '.join(_FILES)}.")
    return Run(
        summary=_read_summary(run_dir / "summary.json"),
        metrics=_read_metrics(run_dir / "metrics.jsonl"),
        layers=_read_layers(run_dir / "layers.csv"),
    )


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read: {error}.") from error
    if not isinstance(summary, dict):
        raise ReportError(f"{path} holds no JSON object.")
    return summary


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """The resolved recipe of a run; empty if its folder holds none. Raises ReportError."""
    path = run_dir / "recipe.yaml"
    if not path.exists():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ReportError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict):
        raise ReportError(f"{path} holds no recipe: it should be a mapping of keys to values.")
    return recipe


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; the last one may be cut short by a kill, or still being written."""
    if not path.exists():
        return []
    lines = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error}.") from error
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            lines.append(record)
    return lines


def last_line(path: Path) -> dict[str, Any] | None:
    """The newest whole line of a run's `metrics.jsonl`, of its end alone; None if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return None


def _read_layers(path: Path) -> list[Layer]:
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                Layer(
                    name=row["layer"],
                    connections=int(row["connections"]),
                    live=int(row["live"]),
                    macs=float(row["macs"]),
                    macs_dense=float(row["macs_dense"]),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path} is not a table of layers ({error!r}).") from error


def latest(run: Run) -> dict[str, Any]:
    """The summary; for a run without one yet, the latest of each metric in its place."""
    if run.summary:
        return run.summary
    names = {
        "top1": "val/top1",
        "top5": "val/top5",
        "density": "connections/density",
        "live": "connections/live",
    }
    latest = {key: values[-1] for key, name in names.items() if (values := run.series(name)[1])}
    if run.layers:
        total = total_of(run.layers)
        latest["connections"] = total.connections
        latest |= {"macs": total.macs, "macs_dense": total.macs_dense}
    return latest


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def total_of(layers: list[Layer]) -> Layer:
    return Layer(
        name="total",
        connections=sum(layer.connections for layer in layers),
        live=sum(layer.live for layer in layers),
        macs=sum(layer.macs for layer in layers),
        macs_dense=sum(layer.macs_dense for layer in layers),
    )


def name_of(run: Run, run_dir: Path) -> str:
    return str(run.summary.get("name") or run_dir.resolve().name)


def rows_of(summary: dict[str, Any]) -> dict[str, str]:
    """Label → value of what the summary knows."""
    known = {key: value for key, value in summary.items() if is_number(value)}
    rows: dict[str, str] = {}
    if "top1" in known:
        rows["top-1"] = f"{100 * known['top1']:.2f} %"
    if "top5" in known:
        rows["top-5"] = f"{100 * known['top5']:.2f} %"
    if "density" in known:
        density = known["density"]
        rows["density"] = f"{percent(density)} (sparsity {100 * (1 - density):.2f} %)"
    if {"live", "connections"} <= known.keys():
        rows["connections"] = f"{int(known['live']):,} of {int(known['connections']):,}"
    if {"macs", "macs_dense"} <= known.keys():
        rows["MACs"] = _macs(known["macs"], known["macs_dense"])
    if "parameters" in known:
        rows["parameters"] = f"{int(known['parameters']):,}"
    if "train_seconds" in known:
        rows["training time"] = _time(known["train_seconds"], known.get("world_size"))
    return rows


def _macs(macs: float, dense: float) -> str:
    text = f"{si(macs)} of {si(dense)}"
    return f"{text} ({dense / macs:.1f}× fewer)" if 0 < 1.05 * macs < dense else text


def _time(seconds: float, world_size: float | None) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
    if not hours and not minutes:
        text = f"{seconds:.1f} s"
    if world_size is None:
        return text
    return f"{text} on {int(world_size)} rank{'s' if world_size != 1 else ''}"


def percent(share: float) -> str:
    """Three significant digits: 100 %, 12.3 %, 3.05 %; three decimals at most: 0.041 %."""
    percent = 100 * share
    if percent in (0, 100):
        return f"{percent:.0f} %"
    digits = 2 - math.floor(math.log10(percent))
    return f"{percent:.{min(max(digits, 1), 3)}f} %"


def si(value: float) -> str:
    """Three significant digits and a prefix: 47.5 k, 4.09 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has written its results, of which the picture is the last."""
    return all((folder / name).exists() for name in ("summary.json", "summary.png"))
