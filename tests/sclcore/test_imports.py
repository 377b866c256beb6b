"""Imports inside the library: none in a circle, and whoever reads a recipe pays for no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import sclcore

# One process for all questions, since each start of torch costs seconds.
PROGRAM = """
import json, sys
import sclcore
before = dir(sclcore)
from sclcore.schedule import Schedule
from sclcore import Schedule as same, Scheduler
heavy = [name for name in ("torch", "numpy", "sclcore.scl.optimizer") if name in sys.modules]
from sclcore import *
from sclcore.scl.optimizer import SCL as owned
print(json.dumps({"heavy": heavy, "listed": before, "same": same is Schedule and SCL is owned,
                  "star": all(name in globals() for name in sclcore.__all__)}))
"""


def test_a_schedule_is_imported_without_torch_and_every_name_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert said["heavy"] == []
    assert said["same"] and said["star"]
    assert set(sclcore.__all__) <= set(said["listed"])


def test_an_unknown_name_is_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'sclcore' has no attribute 'Slc'"):
        sclcore.Slc  # type: ignore[attr-defined]  # noqa: B018
