"""What pyproject.toml cannot say: the compiled decoder of JPEG crops, and the names in a wheel.

In a checkout, installed as editable, the folders are the packages. Many projects have a `data` or a
`launcher` of their own, and of two packages of one name Python finds one. So a wheel has them as
`scl.data` and `scl.launcher`, with the recipes and the Slurm scripts beside them; `sclcore` keeps
its name.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.install_lib import install_lib

ROOT = Path(__file__).resolve().parent
RENAMED = ("data", "launcher")
FILES = ("recipes", "slurm")


def renamed(source: str, where: str) -> str:
    """`source` with its imports of the packages that a wheel has under `scl`. Raises SystemExit."""
    lines = source.encode().splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            if ours := {alias.name for alias in node.names if is_renamed(alias.name)}:
                raise SystemExit(f"{where}:{node.lineno}: write `from {min(ours)} import …`")
        elif isinstance(node, ast.ImportFrom) and not node.level and is_renamed(node.module or ""):
            line, column = lines[node.lineno - 1], node.col_offset
            tail = re.sub(rb"^from\s+", b"from scl.", line[column:])
            lines[node.lineno - 1] = line[:column] + tail
    return b"".join(lines).decode()


def is_renamed(module: str) -> bool:
    return module.partition(".")[0] in RENAMED


class InstallLib(install_lib):
    """Puts into a wheel what it is to hold; an editable installation does not come here."""

    def run(self) -> None:
        super().run()
        assert self.install_dir is not None
        folder = Path(self.install_dir)
        package = folder / "scl"
        package.mkdir()
        (package / "__init__.py").write_text('"""`scl`; the method itself is in `sclcore`."""\n')
        for name in RENAMED:
            (folder / name).rename(package / name)
        for file in package.rglob("*.py*"):
            if file.suffix in (".py", ".pyi"):
                file.write_text(renamed(file.read_text("utf-8"), str(file)), "utf-8")
        for name in FILES:
            shutil.copytree(ROOT / name, package / name)


class Wheel(bdist_wheel):
    """Tells pip the names of what `InstallLib` has put there."""

    def run(self) -> None:
        # Asked for a part of its work, this command also serves editable installations.
        self.holds_packages = True
        super().run()

    def write_wheelfile(self, wheelfile_base: str, *more: Any) -> None:
        super().write_wheelfile(wheelfile_base, *more)
        if getattr(self, "holds_packages", False):
            entry_points = Path(wheelfile_base, "entry_points.txt")
            text = entry_points.read_text("utf-8")
            entry_points.write_text(text.replace("launcher.cli:main", "scl.launcher.cli:main"))
            Path(wheelfile_base, "top_level.txt").write_text("scl\nsclcore\n")


# Optional: without a C compiler or libjpeg-turbo's headers, data/images/region.py decodes with
# simplejpeg, to the same pixels.
setup(
    ext_modules=[
        Extension("data.images._crop", ["data/images/_crop.c"], libraries=["jpeg"], optional=True)
    ],
    cmdclass={"install_lib": InstallLib, "bdist_wheel": Wheel},
)
