"""The subcommands of `scl`: of each, a module of its name has the options and what it calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

from rich_argparse import RawDescriptionRichHelpFormatter

Commands = argparse._SubParsersAction

# Here, so that `scl --help` imports none of the modules.
SUMMARIES = {
    "init": "look at a folder of images and write a recipe for it",
    "train": "train a recipe, on as many ranks of this machine as asked",
    "sweep": "train many runs: settings × seeds of one or more recipes",
    "forecast": "predict the density that each λ would leave",
    "retrain": "train the structure that a run found anew: its masks fixed, other weights",
    "eval": "evaluate the written model of a run",
    "predict": "say which classes images are of, by the written model of a run",
    "report": "draw the pictures of a run, show its table; also while it is trained",
    "recipe": "list every key of a recipe with choices, default and meaning",
    "completion": "print what completes `scl` in a shell: bash or zsh",
    "compare": "compare runs: table, Pareto front, curves, layers",
    "checkpoint": "list, verify, prune and convert the checkpoints of a run",
    "export": "write a model in formats that others read",
    "shrink": "make a trained network smaller: fewer features, or a latency to keep",
    "bench": "measure how long a model takes on this machine",
    "pack": "pack images into WebDataset shards with a manifest",
    "slurm": "write the scripts that sbatch takes into this folder",
    "doctor": "check shards: manifest, index, checksums, every image",
}


class Parser(argparse.ArgumentParser):
    """Shows the subcommand's usage for an unknown argument; argparse would show that of `scl`."""

    def parse_known_args(self, *arguments: Any, **more: Any) -> Any:
        options, unknown = super().parse_known_args(*arguments, **more)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown


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


def add_commands(parser: argparse.ArgumentParser, asked: str | None = None) -> None:
    """Give `parser` all commands; the options of `asked` alone, or of all."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, summary in SUMMARIES.items():
        if asked in (None, name):
            import_module(f"{__package__}.{name}").add(commands)
        else:
            commands.add_parser(name, help=summary)


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
