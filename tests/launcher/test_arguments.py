"""Settings on the command line, however they are written."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from launcher import cli
from launcher.arguments import spelled_out


@pytest.mark.parametrize(
    "given",
    [
        "--set method.lam=0.2 --set seed=1",
        "--set method.lam=0.2 seed=1",
        "--set=method.lam=0.2 seed=1",
        "--method.lam=0.2 --set seed=1",
        "--method.lam=0.2 seed=1",
        "--set method.lam=0.2 seed=1 --ranks 2",
    ],
)
def test_every_spelling_is_the_same_two_settings(given: str) -> None:
    words = ["train", "--recipe", "recipes/digits_scl.yaml", *given.split()]
    options = cli.parser("train").parse_args([*spelled_out(words)])
    assert options.overrides == ["method.lam=0.2", "seed=1"]


@pytest.mark.parametrize(
    "words",
    [
        "retrain --set optim.epochs=3 runs/lam=0.2 --weights new",
        "compare runs/a runs/b=1 --out x=1",
        "train --recipe x.yaml --ranks 2",
        "eval runs/a --data=shards",
    ],
)
def test_what_is_no_setting_stays_as_it_is(words: str) -> None:
    assert [*spelled_out(words.split())] == words.split()


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"scl {version('scl-train')}\n"
