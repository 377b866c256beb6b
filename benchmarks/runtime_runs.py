"""The trained networks of `benchmarks.runtime`: the demo's, and the glyphs' of few epochs."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

# A few epochs each, to 5 % of the connections: what is measured is time, not accuracy.
_SHORT = "--set method.target_density=0.05 --set tracking.wandb=off"
RUNS = {
    Path("runs/digits_scl"): (
        "pack digits --out runs/data/digits",
        "train --recipe recipes/digits_scl.yaml",
    ),
    Path("runs/glyphs_lenet5"): (
        "pack glyphs --out runs/data/glyphs",
        f"train --recipe recipes/glyphs/lenet5.yaml --set optim.epochs=4 {_SHORT}",
    ),
    Path("runs/glyphs_resnet20"): (
        "pack glyphs --out runs/data/glyphs",
        f"train --recipe recipes/glyphs/resnet20.yaml --set optim.epochs=3 {_SHORT}",
    ),
}


def train_missing() -> None:
    """Pack and train, by `scl`, what is not here; raises CalledProcessError where that fails."""
    for run, commands in RUNS.items():
        if (run / "model.safetensors").exists():
            continue
        for command in commands:
            words = shlex.split(command)
            packed = Path(words[-1]) / "train/manifest.json"
            if words[0] == "pack" and packed.exists():
                continue
            print(f"scl {command}", flush=True)
            subprocess.run([sys.executable, "-m", "launcher.cli", *words], check=True)
