"""What `make demo` trains, with the settings it trains with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launcher.conftest import ROOT, finish, launch, scl


@pytest.mark.timeout(600)
def test_the_demo_keeps_its_promise(tmp_path: Path) -> None:
    """At least 98 % top-1 on the held-out fifth, with at most 5 % of the connections."""
    data, run_dir = tmp_path / "digits", tmp_path / "run"
    code, output = finish(launch(scl("pack", "digits", "--out", data)))
    assert code == 0, output
    recipe = ROOT / "recipes" / "digits_scl.yaml"
    command = scl("train", "--recipe", recipe, "--set", f"run_dir={run_dir}")
    code, output = finish(launch([*command, "--set", f"data.path={data}"]), timeout=500)
    assert code == 0, output
    result = json.loads((run_dir / "summary.json").read_text())
    assert result["world_size"] == 2
    assert result["top1"] >= 0.98
    assert result["density"] <= 0.05
    assert result["train_seconds"] < 180
