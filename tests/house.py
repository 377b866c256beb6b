"""Who imports whom in this repository, read from its files."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "sclcore": {"data", "launcher", "deepspeed", "wandb", "webdataset"},
    "data": {"sclcore", "launcher", "deepspeed", "wandb"},
}
# The rooms of a package (its folders, and the files beside them), the lowest floor first. A room
# imports from rooms below it and from itself, never from one above: nor where only types need it,
# nor inside a function.
FLOORS = {
    "data": [
        "errors",
        "files",
        "processes",
        "config",
        "images",
        "shards",
        "sources",
        "packing",
        "augmentation",
        "storage",
        "stream",
    ],
    "sclcore": [
        "lazy",
        "choice",
        "courses",
        "schedule",
        "sharing",
        "optim",
        "layout",
        "network",
        "kernels",
        "held",
        "scl",
        "telemetry",
        "driver",
        "methods",
        "registry",
        "export",
    ],
    "launcher": [
        "errors",
        "terminal",
        "arguments",
        "recipe",
        "cluster",
        "folder",
        "checkpoints",
        "models",
        "tracking",
        "reports",
        "run",
        "evaluation",
        "export",
        "bench",
        "compare",
        "doctor",
        "start",
        "shrink",
        "api",
        "commands",
        "cli",
        "train",
    ],
}


def imported(path: Path) -> set[str]:
    """Top-level names of everything that `path` imports, anywhere in it."""
    return {name.partition(".")[0] for name in _imports(path)}


def _imports(path: Path) -> Iterator[str]:
    """Every name that `path` imports, dots and all; from a module, also what is taken from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_of(root: Path, package: str) -> dict[str, set[str]]:
    """The modules of a package by dotted name, and those of them that each one imports."""
    files = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted((root / package).rglob("*.py"))
    }
    return {name: {*_modules_imported(file, files)} - {name} for name, file in files.items()}


def _modules_imported(path: Path, known: Container[str]) -> Iterator[str]:
    """Those of the modules `known` that `path` imports; not the folder of one that is named."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names = (f"{node.module}.{alias.name}", node.module)
                yield from [name for name in names if name in known][:1]


def room_of(module: str) -> str:
    """The folder of a package, or the file beside the folders, in which a module lies."""
    return module.split(".")[1] if "." in module else ""


def upward(modules: dict[str, set[str]], floors: list[str]) -> list[str]:
    """The imports that go up, in words; a package's own `__init__` may show what is in any room."""
    height = {"": -1} | {room: floor for floor, room in enumerate(floors)}
    return [
        f"{module} imports {other}"
        for module, others in modules.items()
        for other in sorted(others)
        if room_of(module) and height[room_of(other)] > height[room_of(module)]
    ]


def circle(modules: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty if there is none."""
    left = {module: set(others) for module, others in modules.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    if not left:
        return []
    path = [next(iter(left))]
    while True:
        following = next(iter(left[path[-1]] & left.keys()))
        if following in path:
            return [*path[path.index(following) :], following]
        path.append(following)
