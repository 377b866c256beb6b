"""`scl export --format native`: a folder that runs without this package, and what it refuses."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from launcher.cli import main
from sclcore.export.native import sclrun
from tests.launcher.export.exports import Output, export, images, logits, network, refused

DOCUMENT = Path(__file__).resolve().parents[3] / "docs/runtime.md"
FILES = {"model.scln", "scl.c", "scl.h", "Makefile", "sclrun.py", "libscl.so", "libscl.a"}


@pytest.fixture(scope="module")
def exported(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "export"
    report = export(undisturbed, out, "compact,native")
    assert {path.name for path in out.iterdir()} >= FILES and not (out / "scl.o").exists()
    sizes = {size["what"]: size["bytes"] for size in report["sizes"]}
    assert (
        sizes["native"] == (out / "model.scln").stat().st_size == report["files"]["native"]["bytes"]
    )
    assert sizes["native"] <= 1.2 * sizes["compact"]
    assert report["files"]["native"]["more"]["live"] >= report["live"]
    return out


def test_the_folder_needs_nothing_of_this_package(
    exported: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Moved, without its libraries, in a Python that has neither torch nor us."""
    moved = tmp_path / "moved"
    shutil.copytree(exported, moved)
    for library in moved.glob("libscl.*"):
        library.unlink()
    batch = images(7)
    np.save(tmp_path / "images.npy", batch.numpy())
    code = f"""
import sys
import numpy as np
sys.path.insert(0, {str(moved)!r})
import sclrun
np.save("out.npy", sclrun.load({str(moved)!r})(np.load("images.npy")))
assert not {{"torch", "sclcore", "launcher"}} & set(sys.modules)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CFLAGS": "-O1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    expected = logits(network(undisturbed), batch)
    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_lines_of_the_document(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the run to a running C program, and to Python's, as they are written there."""
    text = DOCUMENT.read_text()
    [program] = re.findall(r"```c\n(.*?)```", text, re.DOTALL)
    [python, *_] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    command, compiler, run = lines[:3]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits_scl").symlink_to(undisturbed)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    Path("classify.c").write_text(program)
    assert len([line for line in program.splitlines() if line.strip()]) == 10
    subprocess.run([*shlex.split(compiler), "-Wall", "-Wextra", "-Werror"], check=True)
    image = images(1)
    image.numpy().tofile("image.f32")
    answer = subprocess.run(run, shell=True, check=True, capture_output=True, text=True).stdout
    expected = logits(network(undisturbed), image)
    torch.testing.assert_close(
        torch.tensor([[float(line) for line in answer.split()]]), expected, rtol=1e-4, atol=1e-4
    )
    names = {"images": images(40).numpy()}
    monkeypatch.syspath_prepend("runs/digits_native")
    exec(python, names)
    expected = logits(network(undisturbed), images(40))
    torch.testing.assert_close(torch.from_numpy(names["logits"]), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_run_is_refused(
    undisturbed: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = ["--format", "native", "--out", tmp_path / "out"]
    settings: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    convnext = timm.create_model("convnext_atto", num_classes=5, **settings)
    save_file(convnext.state_dict(), tmp_path / "convnext.safetensors")
    more = ["--model", "convnext_atto", "--image-size", "32"]
    more += [part for k, v in settings.items() for part in ("--kwarg", f"{k}={list(v)}")]
    line = refused(capsys, tmp_path / "convnext.safetensors", *native, *more, code=1)
    assert "the operator permute (stem.1) to 2×8×8×8 has no kernel" in line

    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    state = load_file(run / "model.safetensors")
    index = int(state["classifier.weight"].flatten().nonzero()[0])
    state["classifier.weight"].view(-1)[index] = torch.nan
    save_file(state, run / "model.safetensors")
    line = refused(capsys, run, *native, code=1)
    assert "classifier has weights that are not finite (NaN or infinite)" in line

    monkeypatch.setenv("CC", "no-such-compiler")
    line = refused(capsys, undisturbed, *native)
    assert "there is no C compiler no-such-compiler, which CC names" in line
    monkeypatch.setenv("CC", "false")
    assert "--format native: false failed" in refused(capsys, undisturbed, *native, code=1)
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv("SCL_KERNELS", "sse9")
    assert "SCL_KERNELS=sse9: this processor or this build has no such kernels" in refused(
        capsys, undisturbed, *native, code=1
    )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp*"))


def test_a_dense_model_is_told_so(undisturbed: Path, tmp_path: Path) -> None:
    state = {
        k: torch.where(v == 0, torch.full_like(v, 0.01), v) if v.ndim > 1 else v
        for k, v in load_file(undisturbed / "model.safetensors").items()
    }
    save_file(state, tmp_path / "dense.safetensors")
    more = ["--model", "small_convnet", "--kwarg", "width=8", "--kwarg", "norm=group"]
    report = export(
        tmp_path / "dense.safetensors", tmp_path / "out", "native", *more, "--image-size", "8"
    )
    assert "slower than in a dense engine" in report["files"]["native"]["speed"]


def test_what_was_damaged_since(exported: Path, tmp_path: Path) -> None:
    for name in ("model.scln", "libscl.so"):
        shutil.copyfile(exported / name, tmp_path / name)
    whole = (tmp_path / "model.scln").read_bytes()
    (tmp_path / "model.scln").write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="the file is damaged: its checksum does not match"):
        sclrun.load(tmp_path)
    (tmp_path / "model.scln").write_bytes(whole)
    model = sclrun.load(tmp_path)
    with pytest.raises(ValueError, match="this network takes batches of 1×8×8"):
        model(np.zeros((1, 1, 9, 8)))
