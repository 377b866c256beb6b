"""SCL from a script or a notebook: train a recipe, read a run, compare several.

    from launcher.api import compare, load_run, train

    run = train("digits.yaml", {"method.target_density": 0.1, "name": "tenth"})
    run.top1, run.density
    run.predict(["seven.png"])
    compare([run, "runs/digits_dense"])

Importing this is light: PyTorch comes when it is needed. What is wrong with a recipe, data or a run
is a `launcher.errors.UserError`, whose message is one sentence.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import RunError, UsageError, UserError
from launcher.folder.results import Run, last_line, percent, read_recipe, read_run, rows_of
from launcher.recipe.load import build_recipe, load_recipe
from launcher.recipe.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from launcher.compare import Comparison
    from launcher.evaluation.classify import Classified

__all__ = ["TrainedRun", "UserError", "compare", "load_run", "train"]

_POLL_S = 0.3
_TAIL = 20

Settings = Mapping[str, Any]
"""Dotted keys of a recipe and their values, as after --set: {"optim.epochs": 20}."""


def train(
    recipe: str | Path | Mapping[str, Any],
    settings: Settings | None = None,
    *,
    ranks: int | None = None,
    continue_with: Settings | None = None,
    progress: bool = True,
) -> TrainedRun:
    """Train a recipe to its end, as `scl train` does in a shell; returns the run.

    `recipe` is a file, or its content as a mapping. `settings` override single keys; `ranks` is
    short for `engine.ranks`. A run that was begun in the same folder goes on; `continue_with`
    changes what may be changed in one (docs/checkpoints.md). It is trained by processes of its
    own, whose output is in `train.log` in the run's folder, and shown as a bar (`progress`) with
    loss, top-1 and density. Interrupting saves the run, stops it and raises KeyboardInterrupt.

    Raises UsageError before anything is started, RunError with the first cause where a run ends
    otherwise.
    """
    resolved = _resolved(recipe, {**(settings or {}), **(continue_with or {})}, ranks)
    with tempfile.TemporaryDirectory(prefix="scl-") as folder:
        file = Path(folder) / "recipe.yaml"
        # JSON is YAML.
        file.write_text(json.dumps(resolved.as_dict()), encoding="utf-8")
        command = [sys.executable, "-m", f"{__package__}.cli", "train", "--recipe", str(file)]
        if continue_with:
            command += ["--continue-with", *_overrides(continue_with)]
        _run(command, resolved, Path(folder) / "train.log", progress=progress)
    return load_run(resolved.folder)


def load_run(folder: str | Path) -> TrainedRun:
    """The run in `folder`, finished or not. Raises UserError where there is none."""
    return TrainedRun(Path(folder), read_run(Path(folder)))


def compare(runs: Sequence[TrainedRun | str | Path], out: str | Path | None = None) -> Comparison:
    """Runs side by side, those that differ in their seed alone as one; shows the table.

    `out` is a folder for the table, the figures and the page of `scl compare`. Raises UserError.
    """
    from launcher.compare import compare_runs, show, write

    comparison = compare_runs([run.folder if isinstance(run, TrainedRun) else run for run in runs])
    show(comparison)
    if out is not None:
        write(comparison, Path(out))
    return comparison


@dataclass(frozen=True)
class TrainedRun:
    """What a run has written; each part may be empty while it is trained."""

    folder: Path
    results: Run

    @property
    def summary(self) -> dict[str, Any]:
        """The outcome: top1, top5, density, live, connections, macs, parameters …; or empty."""
        return self.results.summary

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A line for each logged interval, by step: what a pandas.DataFrame is made of."""
        return self.results.metrics

    @property
    def top1(self) -> float | None:
        """Share of the validation images whose most probable class is right; None if unknown."""
        return self.summary.get("top1")

    @property
    def density(self) -> float | None:
        """Share of the connections that live; None if unknown."""
        return self.summary.get("density")

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Every setting, defaults filled in, as plain values."""
        return read_recipe(self.folder)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(epochs, values) of one metric, such as "val/top1" or "connections/density"."""
        return self.results.series(name)

    def model(self) -> nn.Module:
        """The network with its weights, in evaluation mode on the CPU; input is normalised.

        Of a run without a model yet, that of its newest checkpoint.
        """
        from launcher.export.source import open_source

        return open_source(self.folder).model

    def predict(self, images: Sequence[str | Path] | str | Path) -> Classified:
        """The probabilities of all classes, of image files or of those in folders."""
        from launcher.evaluation.classify import classify

        several = [images] if isinstance(images, str | Path) else images
        return classify(self.folder, [Path(image) for image in several])

    def evaluate(
        self, *, split: str = "val", against: TrainedRun | str | Path | None = None
    ) -> dict[str, Any]:
        """What `scl eval` measures, as plain values: `results`, and `against` another run."""
        from launcher.evaluation.report import evaluate

        other = against.folder if isinstance(against, TrainedRun) else against
        return evaluate(self.folder, split=split, against=None if other is None else Path(other))

    def __repr__(self) -> str:
        known = ", ".join(f"{key} {value}" for key, value in rows_of(self.summary).items())
        return f"<run {self.folder}: {known or 'not finished'}>"

    def _repr_html_(self) -> str:
        """A small table where a notebook shows the run."""
        from html import escape

        rows = rows_of(self.summary) or {"": "not finished"}
        cells = "".join(
            f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items()
        )
        return f"<table><caption>{escape(str(self.folder))}</caption>{cells}</table>"


def _resolved(
    recipe: str | Path | Mapping[str, Any], settings: Settings, ranks: int | None
) -> Recipe:
    overrides = _overrides(settings)
    if ranks is not None:
        overrides.append(f"engine.ranks={ranks}")
    if isinstance(recipe, Mapping):
        return build_recipe(json.loads(json.dumps(recipe, default=str)), overrides, "the recipe")
    return load_recipe(Path(recipe), overrides)


def _overrides(settings: Settings) -> list[str]:
    return [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]


def _run(command: list[str], recipe: Recipe, log: Path, *, progress: bool) -> None:
    """Run `scl train` to its end, and put its output into the run's folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)])}
    with log.open("w", encoding="utf-8") as output, _bar(recipe, shown=progress) as advance:
        # A group of its own: an interrupt reaches it through this process alone, and once.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                advance()
                time.sleep(_POLL_S)
            advance()
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        finally:
            _keep(log, recipe.folder)
    if process.returncode:
        raise _failure(process.returncode, log.read_text(encoding="utf-8", errors="replace"))


def _keep(log: Path, folder: Path) -> None:
    # A run that was refused has no folder, and gets none.
    if folder.is_dir():
        with (folder / "train.log").open("a", encoding="utf-8") as file:
            file.write(log.read_text(encoding="utf-8", errors="replace"))


def _failure(code: int, output: str) -> UserError:
    """What ended a run, from what it has said."""
    lines = output.splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if said:
        return UsageError(said[0]) if code == 2 else RunError(said[0])
    tail = "\n".join(lines[-_TAIL:])
    return RunError(f"training ended with exit code {code}; the end of its output:\n{tail}")


@contextmanager
def _bar(recipe: Recipe, *, shown: bool) -> Iterator[Any]:
    """A function that brings a bar over the epochs up to date with `metrics.jsonl`."""
    with warnings.catch_warnings():
        # That there are no widgets; the bar is text then.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    path = recipe.folder / "metrics.jsonl"
    bar = tqdm(
        total=recipe.optim.epochs,
        desc=recipe.name,
        unit="epoch",
        disable=not shown,
        bar_format="{desc}: {n:.1f}/{total_fmt} epochs |{bar}| {elapsed}<{remaining}{postfix}",
    )

    def advance() -> None:
        line = last_line(path)
        if line is None or not shown:
            return
        bar.n = min(float(line.get("epoch") or 0), bar.total)
        words = {"train/loss": "loss {:.3f}", "val/top1": "top-1 {:.2%}"}
        texts = [form.format(line[k]) for k, form in words.items() if line.get(k) is not None]
        if (density := line.get("connections/density")) is not None:
            texts.append(f"density {percent(density)}")
        bar.set_postfix_str(", ".join(texts), refresh=False)
        bar.refresh()

    with bar:
        yield advance
