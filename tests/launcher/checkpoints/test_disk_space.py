from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.checkpoints.disk_space import in_units, shortage
from launcher.checkpoints.manifest import CheckpointError
from launcher.checkpoints.write import open_folder
from launcher.cli import main


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert shortage(tmp_path / "not" / "there" / "yet", free // 2) is None
    lack = shortage(tmp_path / "not" / "there" / "yet", 2 * free)
    assert lack is not None
    assert lack.startswith("it needs ") and f"and {tmp_path} has " in lack
    # A file system that does not tell its size is given the benefit of the doubt.
    assert shortage(Path("/proc/x"), 10**18) is None


def test_nothing_is_begun_without_room(tmp_path: Path) -> None:
    content = 2 * shutil.disk_usage(tmp_path).free
    with pytest.raises(CheckpointError, match=r"it needs .* free"):
        open_folder(tmp_path / "checkpoints", step=1, content=content)
    assert [*(tmp_path / "checkpoints").iterdir()] == []


def test_units() -> None:
    sizes = [831, 12_345, 12_345_678, 1_234_567_890, 5e12]
    assert [in_units(n) for n in sizes] == ["831 B", "12.3 kB", "12.3 MB", "1.23 GB", "5 TB"]


def test_a_run_whose_first_checkpoint_cannot_fit_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    huge = "model.kwargs={width: 400000}"
    command = ["train", "--recipe", str(recipe), "--set", f"run_dir={run_dir}", "--set", huge]
    assert main(command) == 2
    assert f"the first checkpoint would not fit into {run_dir}: it needs" in capsys.readouterr().err
    assert not run_dir.exists()
