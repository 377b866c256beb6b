"""What the campaign trains: small real recipes on packed digits, and their undisturbed runs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.faults.ranks import ROOT, WORLD, Ranks

STEPS_PER_EPOCH = 1437 // 96
_HOOK = Path(__file__).with_name("poison")


@dataclass(frozen=True)
class Limits:
    """Time-outs of the campaign, in seconds: those the runs are configured with, and patience."""

    collective: int = 30
    step: int = 12
    start: int = 240
    """How long a start, or a way to a moment, may take on this machine before it is a failure."""

    @property
    def end(self) -> float:
        """From a fault to the last process gone: the time-out, and the time to clear away."""
        return max(self.collective, self.step) + 15.0


@dataclass(frozen=True)
class Course:
    """A training that is run once undisturbed and then again through faults."""

    name: str
    folder: Path
    limits: Limits
    epochs: int = 30
    settings: tuple[str, ...] = ()
    nans: dict[int, int] = field(default_factory=dict)
    """Update → the rank of which one gradient becomes NaN there."""

    @property
    def total_steps(self) -> int:
        return self.epochs * STEPS_PER_EPOCH

    @property
    def data(self) -> Path:
        return self.folder / "digits"

    @property
    def reference(self) -> Path:
        """The run folder of the undisturbed run."""
        return self.folder / f"undisturbed-{self.name}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of its ranks: Python imports the injector of NaN when it starts."""
        if not self.nans:
            return {}
        nans = ",".join(f"{step}:{rank}" for step, rank in self.nans.items())
        return {"PYTHONPATH": str(_HOOK), "SCL_FAULTS_NAN": nans}

    def arguments(self, run: Path) -> list[str]:
        """What follows `scl train`, or the module of a rank."""
        arguments = ["--recipe", str(self.folder / "recipe.yaml")]
        settings = (
            f"run_dir={run}",
            f"optim.epochs={self.epochs}",
            f"engine.timeout_s={self.limits.collective}",
            f"engine.step_timeout_s={self.limits.step}",
            *self.settings,
        )
        for setting in settings:
            arguments += ["--set", setting]
        return arguments

    def prepare(self) -> None:
        """Pack the data, write the recipe, run it undisturbed; what is there already stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.data / "packing.json").exists():
            command = [sys.executable, "-m", "launcher.cli", "pack", "digits"]
            command += ["--out", str(self.data)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(_recipe(self.data)))
        if (self.reference / "summary.png").exists():
            return
        log = self.folder / f"{self.reference.name}.txt"
        arguments = self.arguments(self.reference)
        with Ranks(arguments, log, "by hand", **self.environment) as ranks:
            gone = ranks.wait_gone(2 * self.limits.start)
            if gone is None or ranks.codes() != [0] * WORLD:
                raise RuntimeError(
                    f"the undisturbed run ended with {ranks.codes()}:\n{ranks.output()}"
                )


def nan_updates(rng: random.Random, count: int, course_steps: int) -> dict[int, int]:
    """`count` updates that are not neighbours, and a rank for each."""
    steps = rng.sample(range(5, course_steps - 5, 3), count)
    return {step: rng.randrange(WORLD) for step in sorted(steps)}


def _recipe(data: Path) -> dict[str, object]:
    """Masks die early, λ warms up for a fifth of the run, and from 0.6 of it masks are frozen."""
    return {
        "name": "faults",
        "model": {"name": "small_convnet", "kwargs": {"width": 8}},
        "data": {
            "path": str(data),
            "image_size": 8,
            "augment": "crop",
            "crop_padding": 1,
            "eval_crop_ratio": 1.0,
        },
        "method": {"name": "scl", "lam": 0.3, "mask_lr": 0.003},
        "optim": {"global_batch_size": 96, "epochs": 30, "lr": 0.05},
        "schedule": {"lam_warmup": 0.2, "freeze_masks_at": 0.6},
        "checkpoint": {"every_steps": 5, "keep": 3},
        "tracking": {"wandb": "off", "log_every": 4},
    }
