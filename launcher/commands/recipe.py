"""`scl recipe`."""

from __future__ import annotations

import argparse

from launcher.commands import SUMMARIES, Commands, add_command

_MORE = """\
--schema prints what editors with a YAML language server complete and check by. It is kept in
recipes/schema.json; a recipe names it in a comment at its top:

  # yaml-language-server: $schema=schema.json

examples:
  scl recipe | less
  scl recipe method.target_density
  scl recipe --yaml scl > mine.yaml"""


def add(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "recipe", _recipe, SUMMARIES["recipe"], _MORE)
    parser.add_argument("key", nargs="?", help="only this key, such as method.lam, or section")
    parser.add_argument(
        "--yaml", metavar="METHOD", help="a complete recipe with a comment at every key"
    )
    parser.add_argument("--schema", action="store_true", help="a JSON schema for editors")


def _recipe(options: argparse.Namespace) -> int:
    from launcher.errors import UsageError

    if sum((options.key is not None, options.yaml is not None, options.schema)) > 1:
        raise UsageError("give a key, or --yaml, or --schema: they print different things")
    if options.schema:
        from launcher.recipe.schema import as_text

        print(as_text(), end="")
        return 0

    from launcher.recipe.describe import as_yaml, describe

    print(describe(options.key) if options.yaml is None else as_yaml(options.yaml).rstrip())
    return 0
