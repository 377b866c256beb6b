"""One module a subcommand of `scl`: its options, and what it calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from rich_argparse import RawDescriptionRichHelpFormatter

Commands = argparse._SubParsersAction


class HelpFormatter(RawDescriptionRichHelpFormatter):
    """Colours on a terminal, plain text elsewhere; square brackets in a help text stay."""

    text_markup = help_markup = False
    group_name_formatter = str
    styles = RawDescriptionRichHelpFormatter.styles | {
        "argparse.groups": "bold",
        "argparse.prog": "bold",
        "argparse.args": "cyan",
        "argparse.metavar": "dim cyan",
        "argparse.text": "default",
    }

    def __init__(self, prog: str, **options: Any) -> None:
        options.setdefault("max_help_position", 28)
        super().__init__(prog, **options)


def add_group(
    commands: Commands, name: str, summary: str, more: str = "", *, metavar: str
) -> Commands:
    """A command that has only subcommands, to be added to what is returned."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=more,
        formatter_class=HelpFormatter,
    )
    return parser.add_subparsers(required=True, metavar=metavar)


def add_command(
    commands: Commands, name: str, run: Callable, summary: str, more: str = ""
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=more,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(command=_told(run))
    return parser


def _told(run: Callable) -> Callable:
    """`run`, with what a file system refuses said as a sentence."""

    def command(options: argparse.Namespace) -> int:
        try:
            return run(options)
        except OSError as error:
            from launcher.errors import disk_refusal

            if refusal := disk_refusal(error):
                raise refusal from error
            raise

    return command
