"""Real file systems that refuse: read-only, full, without permission, a file in the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.conftest import ROOT, environment

# In namespaces of its own: what is mounted there is nowhere else, and gone with the process. Root
# without these two rights is refused like anybody.
_SCRIPT = """
set -e
mount -t tmpfs none "$1"/full -o size=64k
mount --bind "$1"/kept "$1"/readonly
mount -o remount,ro,bind "$1"/readonly
shift
exec setpriv --bounding-set -dac_override,-dac_read_search "$@"
"""
_PROGRAM = """
import contextlib, io, json, sys
from launcher import cli
results = []
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(words)
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:
            code = repr(error)
    results.append([code, said.getvalue()])
print(json.dumps(results))
"""
_REASONS = {
    "readonly": "read-only file system",
    "full": "no space left on device",
    "denied": "permission denied",
    "file": "not a directory",
}
_OWN_WORDS = (
    *("a file is where a folder", "read-only here or not yours", "is no folder: choose another"),
    *("is not a folder: choose another", "kb free; ", "something else is there already"),
)


def refusals(place: Path, commands: list[list[str]]) -> list[tuple[Any, str]]:
    """Exit code and errors of each `scl` command, beside the refusing folders in `place`."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv"))):
        pytest.skip("mounting takes root, unshare and setpriv")
    program = [sys.executable, "-c", _PROGRAM, json.dumps(commands)]
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", _SCRIPT, "bash", str(place), *program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=250,
    )
    if "mount" in done.stderr and done.returncode in (1, 32) and not done.stdout:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return [(code, said) for code, said in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.long
def test_every_command_says_what_the_file_system_refuses(
    undisturbed: Path, shards: Path, recipe: Path, tmp_path: Path
) -> None:
    for name in ("kept", "readonly", "full", "denied"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    for name in ("kept", "denied"):
        shutil.copytree(undisturbed, tmp_path / name / "run")
        (tmp_path / name / "tars").mkdir()
        [first, *_] = sorted((shards / "train").glob("*.tar"))
        shutil.copy(first, tmp_path / name / "tars")
    for folder in [tmp_path / "denied", *(tmp_path / "denied").rglob("*")]:
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    commands, reasons = [], []
    for place, reason in _REASONS.items():
        out = str(tmp_path / place / "out")
        writing = [
            ["export", str(undisturbed), "--format", "safetensors,csv", "--out", out],
            ["train", "--recipe", str(recipe), "--set", f"run_dir={out}", "optim.epochs=1"],
            ["compare", str(undisturbed), "--out", out],
            ["eval", str(undisturbed), "--out", out],
            ["pack", "digits", "--out", out, "--workers", "1"],
        ]
        if place in ("readonly", "denied"):
            writing += [
                ["pack", "index", str(tmp_path / place / "tars")],
                ["report", str(tmp_path / place / "run")],
            ]
        commands += writing
        reasons += [reason] * len(writing)
    wrong = []
    for words, reason, (code, said) in zip(
        commands, reasons, refusals(tmp_path, commands), strict=True
    ):
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        # Some look before they start, and have words of their own.
        known = (reason, *_OWN_WORDS)
        sound = code in (1, 2) and len(errors) == 1 and "Traceback" not in said
        if not sound or not any(
            k in errors[0].lower() and str(tmp_path) in errors[0] for k in known
        ):
            wrong.append((" ".join(words), code, said))
    assert not wrong, "\n".join(map(str, wrong))
