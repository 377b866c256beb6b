"""A benchmark that has a command of its own, through the launcher's engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.parts import Measuring


def run(measuring: Measuring) -> None:
    command = [sys.executable, "-m", f"benchmarks.{measuring.name}"]
    command += ["--device", measuring.device.type]
    # Ten epochs of two networks take minutes; the quick form is one of one.
    if measuring.is_rehearsal or not measuring.has(120):
        command.append("--quick")
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
