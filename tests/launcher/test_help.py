"""`--help` teaches: every option is explained, every command has an example that parses."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest
from rich.console import Console

from launcher import cli
from launcher.commands import HelpFormatter


def parsers(
    parser: argparse.ArgumentParser, path: str = "scl"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every parser below `parser`, with the words that lead to it."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from parsers(below, f"{path} {name}")


ALL = dict(parsers(cli.parser()))


@pytest.mark.parametrize("path", ALL)
def test_every_option_is_explained(path: str) -> None:
    for action in ALL[path]._actions:
        # What a folder is to an argument called DIR is said in the description.
        named = action.metavar == "DIR" and not action.option_strings
        below = isinstance(action, argparse._SubParsersAction)
        assert action.help or named or below, f"{path}: {action.dest}"


@pytest.mark.parametrize("path", ALL)
def test_every_command_has_an_example_that_parses(path: str) -> None:
    lines = [line.strip() for line in (ALL[path].epilog or "").splitlines()]
    examples = [line for line in lines if re.match(rf"{path}\b", line)]
    assert examples, f"{path} has no example"
    for example in examples:
        command = re.split(r" \| | > |\s{3,}", example)[0]
        cli.parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("path", ALL)
def test_help_is_plain_text_where_there_is_no_terminal(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.parser().parse_args([*path.split()[1:], "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert output.startswith(f"usage: {path}")
    assert all(len(line) <= 100 for line in output.splitlines())


def test_help_has_colours_on_a_terminal_and_loses_no_bracket() -> None:
    parser = argparse.ArgumentParser(
        "scl", epilog="try [bold] N[,N…]", formatter_class=HelpFormatter
    )
    parser.add_argument("--shape", metavar="[N]", help="such as [in, out]")
    terminal = Console(force_terminal=True, color_system="standard", width=80)
    formatter = parser._get_formatter()
    assert isinstance(formatter, HelpFormatter)
    formatter.console = terminal
    parser.formatter_class = lambda prog: formatter  # type: ignore[assignment]
    text = parser.format_help()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "such as [in, out]" in plain and "try [bold] N[,N…]" in plain
    assert text != plain


@pytest.mark.parametrize("command", ["train", "pack digits", "checkpoint ls"])
def test_an_unknown_option_shows_the_usage_of_its_own_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--nothing", "--recipe", "x", "--out", "x", "x"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: scl {command} ") and "--nothing" in said.splitlines()[-1], said
