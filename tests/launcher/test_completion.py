"""`scl completion`: what bash completes, asked of bash itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher import cli

ASK = """\
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_scl
printf "%s\\n" "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "scl"
    capture = pytest.MonkeyPatch()
    with path.open("w", encoding="utf-8") as file:
        capture.setattr("sys.stdout", file)
        assert cli.main(["completion", "bash"]) == 0
    capture.undo()
    return path


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["scl", "predi"], {"predict"}),
        (["scl", "tr"], {"train"}),
        (["scl", "train", "--rec"], {"--recipe"}),
        (["scl", "pack", "image"], {"imagenet", "imagefolder"}),
        (["scl", "train", "--recipe", "recipes/digits_s"], {"recipes/digits_scl.yaml"}),
        (["scl", "train", "--set", "method.target_d"], {"method.target_density="}),
        (["scl", "completion", ""], {"bash", "zsh"}),
    ],
    ids=lambda words: " ".join(sorted(words) if isinstance(words, set) else words),
)
def test_bash_completes(typed: list[str], expected: set[str], script: Path) -> None:
    ended = subprocess.run(
        ["bash", "-c", ASK, "bash", str(script), *typed],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=30,
    )
    assert ended.returncode == 0, ended.stderr
    assert set(ended.stdout.split()) == expected


def test_zsh_gets_a_script_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Not run: no shell but bash is at hand everywhere."""
    assert cli.main(["completion", "zsh"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("#compdef scl") and "method.target_density=" in output
