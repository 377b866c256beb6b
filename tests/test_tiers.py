"""Every test is in one of the two tiers: run by `make test`, or marked long for `make test-all`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import COLLECTED

ROOT = Path(__file__).resolve().parents[1]


def test_what_is_left_out_is_what_is_marked_long(request: pytest.FixtureRequest) -> None:
    collected, config = request.config.stash[COLLECTED], request.config
    run = {item.nodeid for item in request.session.items}
    assert run | collected.left_out == collected.tests.keys() and not run & collected.left_out
    if config.option.keyword or config.option.markexpr not in ("", "not long"):
        pytest.skip("chosen by hand")
    marked = {name for name, long in collected.tests.items() if long}
    assert collected.left_out == (marked if config.option.markexpr else set())


def test_no_file_is_passed_over(request: pytest.FixtureRequest) -> None:
    if request.config.args != request.config.getini("testpaths"):
        pytest.skip("files were chosen by hand")
    files = set((ROOT / "tests").rglob("test_*.py"))
    assert request.config.stash[COLLECTED].files == files


def test_the_second_command_leaves_nothing_out() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = {
        name: makefile.split(f"\n{name}: ")[1].split("\n\n")[0].splitlines()[1:]
        for name in ("test", "test-all")
    }
    around = "\t@$(CHECK_TYPES); $(PYTEST){}; $(SAY_TYPES)"
    assert commands["test"] == ["\t$(STYLE)", around.format("")]
    assert commands["test-all"] == ["\t$(STYLE)", around.format(' -m ""')]
    assert " -m " not in makefile.split("\nPYTEST := ")[1].splitlines()[0].split("pytest")[1]
