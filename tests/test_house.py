"""The rules of the house that a machine can hold: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "sclcore": {"data", "launcher", "deepspeed", "wandb", "webdataset"},
    "data": {"sclcore", "launcher", "deepspeed", "wandb"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of everything that `path` imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_run_downhill(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): imported(f) & FORBIDDEN[room] for f in files}
    assert {name: sorted(found) for name, found in wrong.items() if found} == {}


def test_the_rule_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    file = tmp_path / "late.py"
    file.write_text("def f():\n    from data.stream.plan import BatchPlan\n    return BatchPlan\n")
    assert imported(file) == {"data"}
