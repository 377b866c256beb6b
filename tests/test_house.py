"""The rules of the house that a machine can hold: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.house import FLOORS, FORBIDDEN, ROOT, circle, imported, modules_of, room_of, upward


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_downhill(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): imported(f) & FORBIDDEN[package] for f in files}
    assert {name: sorted(found) for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_are_floors(package: str) -> None:
    modules = modules_of(ROOT, package)
    assert sorted({room_of(module) for module in modules} - {""}) == sorted(FLOORS[package])
    assert upward(modules, FLOORS[package]) == []


@pytest.mark.parametrize("package", FORBIDDEN | FLOORS)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    assert circle(modules_of(ROOT, package)) == []


def test_the_rules_see_an_import_inside_a_function_and_one_for_types(tmp_path: Path) -> None:
    (tmp_path / "p" / "low").mkdir(parents=True)
    (tmp_path / "p" / "high").mkdir()
    (tmp_path / "p" / "low" / "a.py").write_text(
        "def f():\n    from p.high import b\n    return b\n"
    )
    (tmp_path / "p" / "high" / "b.py").write_text("if TYPE_CHECKING:\n    from p.low.a import f\n")
    assert imported(tmp_path / "p" / "low" / "a.py") == {"p"}
    modules = modules_of(tmp_path, "p")
    assert upward(modules, ["low", "high"]) == ["p.low.a imports p.high.b"]
    assert sorted(set(circle(modules))) == ["p.high.b", "p.low.a"]
    modules["p.low.a"] = set()
    assert circle(modules) == []


@pytest.mark.parametrize("package", FORBIDDEN | FLOORS)
def test_each_folder_says_what_lives_there(package: str) -> None:
    folders = {file.parent for file in (ROOT / package).rglob("*.py")}
    # Without one a folder is in no wheel.
    files = [folder / "__init__.py" for folder in folders]
    assert [str(file) for file in files if not file.exists()] == []
    assert [file for file in files if not ast.get_docstring(ast.parse(file.read_text()))] == []
