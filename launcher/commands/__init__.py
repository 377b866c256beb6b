"""One module a subcommand of `scl`: its options, and what it calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Commands = argparse._SubParsersAction


def add_command(
    commands: Commands, name: str, run: Callable, summary: str, more: str = ""
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser
