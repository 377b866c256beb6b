"""A benchmark that has a command of its own, through the launcher's engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.parts import Measuring

# What the whole of it takes on a GPU, starting included, and with which options.
_WHOLE: dict[str, tuple[float, list[str]]] = {
    "telemetry": (40, []),
    "checkpoint": (30, ["--rounds", "2"]),
}


def run(measuring: Measuring) -> None:
    command = [sys.executable, "-m", f"benchmarks.{measuring.name}"]
    command += ["--device", measuring.device.type]
    seconds, options = _WHOLE[measuring.name]
    # The quick form is a smaller network, or small images: its ratio is that of those.
    is_quick = measuring.is_rehearsal or not measuring.has(seconds)
    command += ["--quick"] if is_quick else options
    measuring.add("form", "quick" if is_quick else "whole")
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    done.check_returncode()
    said = json.loads(done.stdout.splitlines()[-1])
    measuring.add("ratio", said["ratio"], "×", f"≤ {said['target']}")
    for name, value in _numbers(said["details"]):
        measuring.add(name, value)


def _numbers(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}: ")
        elif isinstance(value, int | float | str):
            yield f"{prefix}{key}", value
