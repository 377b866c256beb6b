"""`scl init`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands import SUMMARIES, Commands, add_command

_MORE = """\
DIR holds a folder of images for each class (or train/ and val/ with such folders), or shards that
`scl pack` wrote. Network, image size, epochs and batch are chosen to suit; the file says why. From
there to a running model: docs/tutorial.md.

example:
  scl init photographs"""


def add(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "init", _init, SUMMARIES["init"], _MORE)
    parser.add_argument("folder", type=Path, metavar="DIR", help="class folders, or shards")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the recipe (default: DIR's name, with .yaml)"
    )


def _init(options: argparse.Namespace) -> int:
    from launcher.errors import UsageError
    from launcher.terminal import say

    if options.out is not None:
        _check_free(options.out)
    if not options.folder.is_dir():
        raise UsageError(f"there is no folder {options.folder}")
    say(f"looking at {options.folder}")

    # Not before it is known that there is something to look at: these take seconds to import.
    from data.files import atomic_write
    from launcher.start.first_recipe import first_recipe, next_commands
    from launcher.start.look import look_at

    look = look_at(options.folder)
    file = options.out or Path(f"{look.name}.yaml")
    _check_free(file)
    text = first_recipe(look, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, text)
    for note in look.notes:
        print(f"note: {note}")
    print(
        f"{file}: a recipe for {look.classes:,} classes, {look.train:,} images to train on and "
        f"{look.val:,} to measure on. Next:\n"
    )
    for command in next_commands(look, file)[:3]:
        print(f"    {command}")
    return 0


def _check_free(file: Path) -> None:
    from launcher.errors import UsageError

    if file.exists():
        raise UsageError(f"{file} is there already: choose another name with --out, or remove it")
