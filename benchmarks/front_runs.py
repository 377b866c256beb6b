"""The runs of `benchmarks.front`: what decides each, and how those that are missing are made."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.front_lines import Line, append, read
from benchmarks.front_tasks import TASKS
from benchmarks.front_training import Images, density, evaluate, structure, train
from launcher.recipe.recipe import Recipe, flatten

_DECISIVE = ("model", "init", "method", "optim", "schedule")


@dataclass(frozen=True)
class Run:
    """One training: split `split` of a task, of which the results are called `name`."""

    task: str
    name: str
    asked: float
    split: int
    recipe: Recipe
    compiled: bool = False

    @property
    def settings(self) -> str:
        # Without what is off: a setting that joins later, and is off, makes no other run.
        every = flatten({key: self.recipe.as_dict()[key] for key in _DECISIVE})
        decisive = json.dumps(sorted((key, value) for key, value in every if not _is_off(value)))
        return hashlib.sha256(decisive.encode()).hexdigest()[:8]

    @property
    def key(self) -> tuple[str, float, int, str]:
        return self.name, self.asked, self.split, self.settings


def _is_off(value: object) -> bool:
    return value is None or value is False or value in ([], {})


def make(run: Run) -> tuple[Run, Line]:
    torch.set_num_threads(1)
    images = TASKS[run.task].images(run.split)
    began = time.perf_counter()
    model = train(run.recipe, images, run.split, compiled=run.compiled)
    return run, line_of(run, model, images, time.perf_counter() - began)


def line_of(run: Run, model: nn.Module, images: Images, seconds: float) -> Line:
    """The line of a run that trained `model` for so many seconds."""
    masks = structure(model)
    top1, loss = evaluate(model, images)
    layers = " ".join(str(int(mask.sum())) for mask in masks.values())
    return Line(
        *(run.name, run.asked, run.split, top1, loss, density(masks), seconds),
        *(run.settings, layers),
    )


def carry_out(runs: list[Run], jobs: int, folder: Path) -> None:
    """Make what has no line yet, and write its line."""
    known = {task: {line.key for line in read(folder / f"{task}.csv")} for task in TASKS}
    missing = [run for run in runs if run.key not in known[run.task]]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are there already", flush=True)
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for run, line in tqdm(_made(missing, jobs), total=len(missing), unit="run"):
        append(folder / f"{run.task}.csv", line)


def _made(runs: list[Run], jobs: int) -> Iterator[tuple[Run, Line]]:
    """In order with one job, here; else as they come, and a process that is killed ends all."""
    if jobs == 1:
        yield from map(make, runs)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(make, run) for run in runs]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)
