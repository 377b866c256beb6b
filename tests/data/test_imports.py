"""What is imported with the modules that every command and every recipe needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LARGE = (
    "numpy",
    "PIL",
    "scipy",
    "sklearn",
    "timm",
    "torch",
    "torch._dynamo",
    "torchvision",
    "tqdm",
    "webdataset",
)
PROGRAM = f"""
import sys
for module in sys.argv[1:]:
    __import__(module)
    print(module, *(name for name in {LARGE} if name in sys.modules))
"""


def large_modules(*modules: str) -> dict[str, list[str]]:
    """What of `LARGE` is there once each of `modules` is, one after the other in a process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *modules],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=100,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    return {module: names for module, *names in lines}


def test_checking_a_recipe_imports_nothing_large() -> None:
    light = ("data", "data.errors", "data.files", "data.processes", "data.config")
    assert large_modules(*light) == {module: [] for module in light}


def test_reading_batches_and_packing_import_no_torchvision() -> None:
    loaded = large_modules("data.packing.pack", "data.stream.pipeline", "data.shards.doctor")
    assert "torch" not in loaded["data.packing.pack"], (
        "each process of a packing would take seconds"
    )
    assert {"torchvision", "torch._dynamo", "timm", "scipy", "sklearn"}.isdisjoint(
        loaded["data.shards.doctor"]
    )
