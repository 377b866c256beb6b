"""`scl checkpoint` on the checkpoints of a real run."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from launcher.checkpoints import checkpoint
from launcher.checkpoints.saved_optimizer import SavedOptimizer
from launcher.cli import main
from tests.launcher.conftest import summary

Output = pytest.CaptureFixture[str]


@pytest.fixture
def run(smooth_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(smooth_run, tmp_path / "run"))


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_ls_shows_what_is_there(run: Path, capsys: Output) -> None:
    root = run / "checkpoints"
    (root / "step-00000098" / "model.pt").unlink()
    assert main(["checkpoint", "ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (newest,) = (line for line in lines if line.startswith("step-00000112"))
    # 112 steps are 8 epochs; 2 ranks, stage 0.
    assert newest.split()[1] == "8.00" and "latest" in newest
    assert f"{summary(run)['top1']:.2%}" in newest and f"{summary(run)['live']:,}" in newest
    rows = [line.rstrip() for line in lines if line.startswith("step-00000098 ")]
    assert rows[0].endswith("damaged")
    assert "step-00000098 is damaged: model.pt is missing" in lines
    front = json.loads((root / "pareto.json").read_text())
    assert any("best" in line for line in lines)
    for entry in front:
        assert any(entry["checkpoint"] in line for line in lines)


def test_verify_reads_everything(run: Path, capsys: Output) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert "step-00000112: sound" in capsys.readouterr().out
    newest = run / "checkpoints" / "step-00000112"
    _flip_bit(newest / "optimizer-00000.pt")
    for path in (run, newest):
        assert main(["checkpoint", "verify", str(path)]) == 1
        assert (
            "step-00000112: optimizer-00000.pt does not match its SHA-256"
            in capsys.readouterr().out
        )


def test_prune_says_then_deletes_what_is_not_kept(run: Path, capsys: Output) -> None:
    root = run / "checkpoints"
    before = _names(run)
    _flip_bit(root / "step-00000112" / "model.pt")
    leftover = root / ".tmp-step-00000200-elsewhere-12-0123abcd"
    leftover.mkdir()
    (leftover / "model.pt").write_bytes(b"half")
    assert main(["checkpoint", "prune", str(run), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would delete" in said and "left by a run that died" in said
    assert "step-00000112" in said and "damaged: model.pt does not match its SHA-256" in said
    assert _names(run) == sorted([*before, leftover.name])

    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert capsys.readouterr().out.count("deleted ") >= 2
    left = _names(run)
    assert leftover.name not in left and "step-00000112" not in left
    # Nothing points to what is gone, and resuming needs no warning.
    found = checkpoint.find(root)
    assert found is not None and found.path.name == (root / "latest").read_text().strip()
    assert checkpoint.verify(root / (root / "best").read_text().strip()) == []


def test_prune_never_takes_the_last_sound_one_nor_disturbs_a_run(run: Path, capsys: Output) -> None:
    before = _names(run)
    with (run / ".lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["checkpoint", "prune", str(run)]) == 2
    assert "another process is training in" in capsys.readouterr().err
    for folder in (run / "checkpoints").glob("step-*"):
        _flip_bit(folder / "model.pt")
    assert main(["checkpoint", "prune", str(run)]) == 2
    assert "is sound, so none is deleted" in capsys.readouterr().err
    assert _names(run) == before


def test_convert_to_a_model(run: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "deep" / "model.safetensors"
    assert main(["checkpoint", "convert", str(run), str(out)]) == 0
    written, final = load_file(out), load_file(run / "model.safetensors")
    assert written.keys() == final.keys()
    for name, value in final.items():
        assert torch.equal(written[name], value), name
    with safe_open(out, framework="pt") as file:
        about = json.loads(file.metadata()["scl"])
    assert about["model"] == "vit_tiny_patch16_224" and about["top1"] == summary(run)["top1"]
    assert main(["checkpoint", "convert", str(run), str(out)]) == 2
    assert f"{out} exists" in capsys.readouterr().err


def test_convert_to_a_whole(run: Path, tmp_path: Path) -> None:
    """That a run continues from one is in test_resume."""
    out = tmp_path / "whole"
    assert main(["checkpoint", "convert", str(run), str(out), "--to", "whole"]) == 0
    assert checkpoint.verify(out) == []
    source, whole = checkpoint.find(run / "checkpoints"), checkpoint.read(out)
    assert source is not None and source.evaluation == whole.evaluation
    before, after = SavedOptimizer(source).whole(), SavedOptimizer(whole).whole()
    for name, piece in before.items():
        for key, value in piece["values"].items():
            assert torch.equal(value, after[name]["values"][key])


@pytest.mark.parametrize("action", ["ls", "verify", "prune"])
def test_a_folder_without_checkpoints_is_named(action: str, tmp_path: Path, capsys: Output) -> None:
    assert main(["checkpoint", action, str(tmp_path)]) == 2
    assert f"error: {tmp_path} holds no checkpoints: give the folder of a run" in (
        capsys.readouterr().err
    )
    assert [*tmp_path.iterdir()] == []
