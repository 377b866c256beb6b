"""SCL from a wheel, in an environment of its own, beside a project with folders of its names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.launcher.conftest import environment

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("sclcore", "data", "launcher", "recipes", "slurm")
OTHERS = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ("--no-deps", "--no-build-isolation", "--quiet")

Here = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, so that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        leave = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    for name in OTHERS:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", str(tree), *OFFLINE, "-w", str(folder)], check=True, timeout=120)
    [file] = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment: the wheel, and what it depends on from around here."""
    return installed(tmp_path_factory.mktemp("venv"), str(wheel))


def installed(folder: Path, *what: str) -> Path:
    venv.create(folder)
    python = folder / "bin" / "python"
    # The packages below these folders, but not what their own .pth files add: SCL as editable.
    [site] = folder.glob("lib/python*/site-packages")
    around = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "around.pth").write_text("\n".join(around))
    pip = [*PIP, "--python", str(python), "install", *OFFLINE, "--ignore-installed"]
    subprocess.run([*pip, *what], check=True, timeout=120)
    return python


@pytest.fixture
def here(python: Path, tmp_path: Path) -> Here:
    """Runs commands of the environment in a project that has a `data` and a `launcher` too."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "foo.py").write_text("y = 'the data of the project'\n")
    (tmp_path / "launcher.py").write_text("y = 'the launcher of the project'\n")

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python.with_name(command)), *arguments],
            cwd=tmp_path,
            env=environment(PYTHONPATH=str(tmp_path)),
            capture_output=True,
            text=True,
            timeout=200,
        )

    return run


def test_a_wheel_has_two_names_and_whole_folders(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"scl", "sclcore"}
    packed = {name.removeprefix("scl/") for name in names}
    for folder in SOURCES:
        # All that git would carry there.
        files = {
            str(file.relative_to(ROOT))
            for file in (ROOT / folder).rglob("*")
            if file.is_file() and file.suffix not in (".pyc", ".so")
        }
        assert files <= packed, sorted(files - packed)


def test_a_project_keeps_its_own_names(here: Here) -> None:
    program = (
        "import sclcore, scl.data.config, scl.launcher.recipe.load\n"
        "from sclcore import SCL, connection_groups\n"
        "from data.foo import y\n"
        "import launcher\n"
        "print(y, launcher.y, SCL.__module__, sep='; ')"
    )
    done = here("python", "-c", program)
    assert done.returncode == 0, done.stderr
    said = "the data of the project; the launcher of the project; sclcore.scl.optimizer"
    assert done.stdout.strip() == said


@pytest.mark.parametrize("named", ["recipes/digits_scl.yaml", "digits_scl"])
def test_recipes_are_found_by_path_and_by_name(here: Here, named: str) -> None:
    done = here("scl", "train", "--recipe", named, "--set", "method.lamb=1")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("unknown key 'method.lamb'; did you mean 'lam'?")
    assert "scl/recipes/digits_scl.yaml" in done.stderr


def test_an_own_file_goes_before_a_shipped_one(here: Here, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "digits_scl.yaml").write_text("mine: 1\n")
    done = here("scl", "train", "--recipe", "recipes/digits_scl.yaml")
    assert done.returncode == 2 and done.stderr.startswith("error: recipes/digits_scl.yaml: ")


def test_slurm_scripts_are_written_where_one_submits(here: Here, tmp_path: Path) -> None:
    assert here("scl", "slurm").returncode == 0
    ours = {file.name: file.read_text() for file in (ROOT / "slurm").glob("*.sh")}
    assert {file.name: file.read_text() for file in (tmp_path / "slurm").iterdir()} == ours
    (tmp_path / "slurm" / "doctor.sh").unlink()
    assert here("scl", "slurm").returncode == 0
    (tmp_path / "slurm" / "train.sh").write_text("changed\n")
    done = here("scl", "slurm")
    assert done.returncode == 2 and "error: slurm/train.sh: there already" in done.stderr
    assert (tmp_path / "slurm" / "train.sh").read_text() == "changed\n"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_packing_training_and_a_sweep_beside_them(here: Here, tmp_path: Path) -> None:
    done = here("scl", "pack", "digits", "--out", "runs/data/digits")
    assert done.returncode == 0, done.stderr
    settings = ("--set", "optim.epochs=1", "data.workers=2", "tracking.wandb=off")
    done = here("scl", "train", "--recipe", "recipes/digits_scl.yaml", *settings)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "digits_scl"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["name"] == "digits_scl"
    assert (run / "model.safetensors").exists()
    done = here("scl", "compare", "runs/digits_scl", "--out", "page")
    assert done.returncode == 0 and list((tmp_path / "page").glob("*.html")), done.stderr
    done = here("scl", "sweep", "recipes/paper/lambda.yaml", "--dry-run")
    assert done.returncode == 0 and "--array=0-26" in done.stderr, done.stderr
    # Started by a launcher, as a file: nothing of the project is in the way there either.
    file = here("python", "-c", "import scl.launcher as l; print(*l.__path__)").stdout.strip()
    arguments = ("--recipe", "digits_scl", *settings, "run_dir=runs/torchrun", "engine.ranks=1")
    done = here("python", "-m", "torch.distributed.run", f"{file}/train.py", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_an_editable_installation_has_the_folders(tree: Path, tmp_path: Path) -> None:
    python = installed(tmp_path / "venv", "--editable", str(tree))
    program = "import data, launcher, sclcore; print(data.__file__, launcher.__file__)"
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([str(python), "-c", program], env=environment(), **options)
    assert done.stdout.split() == [
        str(tree / name / "__init__.py") for name in ("data", "launcher")
    ]
    scl = str(python.with_name("scl"))
    done = subprocess.run([scl, "--version"], env=environment(), **options)
    assert done.stdout.startswith("scl 0."), done.stderr
    # Not a name that nobody else has: said, where it was `'data' is not a package`.
    (tmp_path / "data.py").touch()
    done = subprocess.run(
        [scl, "recipe"], env=environment(PYTHONPATH=os.fspath(tmp_path)), **options
    )
    assert f"'data' is {tmp_path}/data.py here, which comes before SCL's" in done.stderr
