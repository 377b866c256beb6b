"""Run folders to compare, as training writes them, in no time: real writers, made-up numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from data.files import atomic_write
from launcher.recipe.recipe import Recipe
from launcher.tracking import Tracker
from sclcore.driver.method import Method
from sclcore.export import budgets_csv
from sclcore.network.connections import LayerBudget

SMALL = {"conv1": 288, "conv2": 18432, "fc": 2560}
DEEP = {f"layer{i // 9}.{i % 9}.conv.weight": 36864 for i in range(54)}

DENSE = {"name": "dense"}


def scl(lam: float, **more: Any) -> dict[str, Any]:
    return {"name": "scl", "lam": lam, **more}


class ThreePasses(Method, frozen=True):
    """Another package's method, which recipes name by its path."""

    name: Literal["three"] = "three"

    @property
    def update_cost(self) -> float:
        return 1 + 2 / 3


@dataclass(frozen=True)
class Made:
    """What a made-up run is told to say. `density`: of every layer but the last, which has more."""

    name: str = "run"
    method: dict[str, Any] = field(default_factory=lambda: {"name": "scl", "lam": 0.3})
    seed: int = 0
    top1: float = 0.98
    density: float = 0.05
    epochs: int = 8
    stopped_at: int | None = None
    layers: dict[str, int] = field(default_factory=lambda: SMALL)
    data: str = "runs/data/digits"
    fingerprint: str = "05df35"
    seconds: float = 12.5


def write_run(folder: Path, made: Made) -> Path:
    """A run folder; one stopped at an epoch has no outcome."""
    recipe = Recipe.model_validate(
        {
            "name": made.name,
            "run_dir": str(folder),
            "seed": made.seed,
            "model": {"name": "small_convnet"},
            "data": {"path": made.data, "image_size": 8},
            "method": made.method,
            "optim": {"global_batch_size": 64, "epochs": made.epochs, "lr": 0.1},
            "tracking": {"wandb": "off"},
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "recipe.yaml", yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    tracker = Tracker(folder, recipe.tracking, run_name=made.name, recipe=recipe.as_dict())
    for half in range(1, 2 * (made.stopped_at or made.epochs) + 1):
        _log(tracker, made, half)
    if made.stopped_at is None:
        budgets = _budgets(made)
        atomic_write(folder / "layers.csv", budgets_csv(budgets))
        tracker.summary(_summary(made, budgets))
    tracker.close()
    return folder


def write_sweep(root: Path) -> Path:
    """Two λ and a dense network, three seeds each; of one λ, a run that is under way."""
    for seed in range(3):
        for lam, top1, density in ((0.1, 0.98, 0.2), (0.4, 0.95, 0.03)):
            made = Made(
                f"scl-lam{lam}-seed{seed}",
                scl(lam),
                seed,
                top1=top1 + 0.004 * seed,
                density=density + 0.002 * seed,
                seconds=10 + seed,
            )
            write_run(root / made.name, made)
        write_run(root / f"dense-seed{seed}", Made(f"dense-seed{seed}", DENSE, seed, 0.985, 1.0))
    write_run(root / "scl-lam0.4-seed3", Made("scl-lam0.4-seed3", scl(0.4), 3, stopped_at=3))
    return root


def _log(tracker: Tracker, made: Made, half: int) -> None:
    """The line of half an epoch, and at the end of one its evaluation."""
    progress = half / (2 * made.epochs)
    learned = 1 - math.exp(-6 * progress)
    line = {"train/loss": 2.3 * math.exp(-4 * progress), "train/top1": made.top1 * learned}
    line["speed/images_per_s"] = 2000.0 + 100 * (half % 3)
    line["connections/density"] = made.density ** min(1.0, 1.5 * progress)
    tracker.log(line, step=11 * half, epoch=half / 2)
    if half % 2 == 0:
        last = half == 2 * made.epochs
        top1 = made.top1 if last else made.top1 * learned
        tracker.log({"val/top1": top1}, step=11 * half, epoch=half / 2)


def _budgets(made: Made) -> list[LayerBudget]:
    last = list(made.layers)[-1]
    densities = dict.fromkeys(made.layers, made.density)
    densities[last] = min(1.0, 4 * made.density)
    return [
        LayerBudget(
            layer=name,
            shape=(count,),
            connections=count,
            live=max(1, round(densities[name] * count)),
            macs_dense=49 * count,
            macs=49 * max(1, round(densities[name] * count)),
        )
        for name, count in made.layers.items()
    ]


def _summary(made: Made, budgets: list[LayerBudget]) -> dict[str, Any]:
    live, connections = sum(b.live for b in budgets), sum(b.connections for b in budgets)
    return {
        "name": made.name,
        "method": made.method["name"],
        "top1": made.top1,
        "top5": 1.0,
        "density": live / connections,
        "live": live,
        "connections": connections,
        "macs": sum(b.macs for b in budgets),
        "macs_dense": sum(b.macs_dense for b in budgets),
        "parameters": connections + 330,
        "epochs": made.epochs,
        "train_seconds": made.seconds,
        "world_size": 1,
        "data": made.fingerprint,
        "artifacts": {},
    }
