"""Jobs from the scripts in slurm/ that train the digits instead."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Slurm, SlurmError, wait_for

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "resnet50_scl.sh"
DOCTOR = ROOT / "slurm" / "doctor.sh"
SWEEP = ROOT / "slurm" / "sweep_lambda.sh"
SWEEP_FILE = ROOT / "slurm" / "sweep.sh"
RECIPE = "recipes/digits_scl.yaml"
# Masks that move fast enough for their hash to say something after so few epochs, and a line in
# metrics.jsonl with the first step.
SETTINGS = ("optim.epochs=12", "method.mask_lr=0.01", "tracking.log_every=1")
# Two ranks must run where there is no GPU, or one.
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
TWO_NODES = (
    *("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"),
    *("--gpus-per-node=0", "--time=10"),
)
# Start-up takes ten seconds alone on two cores, and several times that beside other tests.
PATIENCE_S = 240


@dataclass(frozen=True)
class Submitted:
    """A job, what it writes and where."""

    slurm: Slurm
    number: str
    data: Path
    folder: Path
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def weights(self) -> bytes:
        """The file of the model, to be the same bit for bit."""
        return (self.folder / "model.safetensors").read_bytes()

    @property
    def starts(self) -> list[dict[str, Any]]:
        """How each start of the run describes its world."""
        lines = (self.folder / "environment.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def wait_end(self, state: str, timeout: float = PATIENCE_S) -> dict[str, str]:
        """Wait for the end, which must be `state`; returns what Slurm knows of the job."""
        try:
            fields = self.slurm.wait_end(self.number, timeout)
        except SlurmError as error:
            fields = self.slurm.show("job", self.number)
            raise SlurmError(f"{error}: {fields}\n{self.log}") from None
        assert fields["JobState"] == state, f"{fields}\n{self.log}"
        return fields

    def wait_training(self) -> None:
        """Wait until the first update is behind."""
        metrics = self.folder / "metrics.jsonl"

        def training() -> bool:
            state = self.slurm.show("job", self.number)["JobState"]
            if state not in ("PENDING", "CONFIGURING", "RUNNING"):
                raise SlurmError(f"job {self.number} is {state}\n{self.log}")
            return metrics.exists() and metrics.stat().st_size > 0

        wait_for(training, PATIENCE_S, "training to begin")


class Submit:
    """`sbatch` of the packaged script, as a context at whose end nothing submitted goes on."""

    def __init__(self, slurm: Slurm, digits: Path, folder: Path) -> None:
        self.slurm = slurm
        self._digits, self._folder = digits, folder
        self._jobs: list[str] = []

    def __enter__(self) -> Submit:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._jobs:
            # Most have ended, which scancel calls an error.
            with contextlib.suppress(SlurmError):
                self.slurm.call("scancel", job)

    def __call__(
        self,
        *options: str,
        script: Path = SCRIPT,
        checkout: Path = ROOT,
        variables: Mapping[str, str] | None = None,
        more: str = "",
    ) -> Submitted:
        """Submit from the folder `checkout`; `variables` win over those that make it the digits.

        `more` are further arguments of the ranks.
        """
        folder = self._folder
        environment = {
            **ON_CPU,
            "SCL_RECIPE": RECIPE,
            "SCL_DATA": str(self._digits),
            "SCL_RUNS": str(folder),
            "SCL_VENV": sys.prefix,
            "SCL_ARGS": " ".join([*(f"--set {setting}" for setting in SETTINGS), more]),
            **(variables or {}),
        }
        options = (*TWO_NODES, f"--output={folder}/%j.log", *options)
        job = self.slurm.submit(script, *options, cwd=checkout, variables=environment)
        self._jobs.append(job)
        run, log = folder / f"{script.stem}-{job}", folder / f"{job}.log"
        return Submitted(self.slurm, job, self._digits, run, log)
