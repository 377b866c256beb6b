"""The digits, from packing to the sparse network, as `make demo` does."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.parts import Measuring

_RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_scl.yaml"


def run(measuring: Measuring) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, run_dir = f"{folder}/digits", f"{folder}/run"
        _scl("pack", "digits", "--out", data)
        settings = [f"run_dir={run_dir}", f"data.path={data}", "engine.ranks=1"]
        settings += ["tracking.wandb=off"]
        if measuring.is_rehearsal:
            settings += ["optim.epochs=2"]
        began = time.perf_counter()
        train = [part for setting in settings for part in ("--set", setting)]
        _scl("train", "--recipe", str(_RECIPE), *train)
        measuring.add("from command to prompt", time.perf_counter() - began, "s")
        result = json.loads((Path(run_dir) / "summary.json").read_text())
    measuring.add("training", result["train_seconds"], "s")
    measuring.add("top-1", result["top1"], "", "" if measuring.is_rehearsal else "≥ 0.98")
    measuring.add("connections left", result["density"], "", "≤ 0.05")


def _scl(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "launcher.cli", *arguments], check=True)
