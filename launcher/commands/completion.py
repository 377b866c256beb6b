"""`scl completion`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launcher.commands import SUMMARIES, Commands, Parser, add_command, add_commands

_MORE = """\
Completes commands, options, files, and the keys of --set. What is printed is complete in itself: a
shell that has read it starts nothing when you press the tabulator.

examples:
  scl completion bash > ~/.local/share/bash-completion/completions/scl
  scl completion zsh > ~/.zsh/completions/_scl"""

# What is behind --set: the keys of recipes.
_SETTINGS = {
    "bash": '_scl_settings() {{ compgen -W "{keys}" -- "$1"; }}',
    "zsh": "_scl_settings() {{ compadd -S '' -- {keys}; }}",
}


_NO_BLANK = """\
# After a key of --set comes its value, without a blank.
_scl() {
  _shtab_scl "$@"
  [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o bashdefault -F _scl scl
"""


def add(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "completion", _completion, SUMMARIES["completion"], _MORE)
    parser.add_argument("shell", choices=("bash", "zsh"), help="which shell it is for")


def _completion(options: argparse.Namespace) -> int:
    import shtab

    from launcher.recipe.keys import all_keys

    whole = Parser(prog="scl")
    add_commands(whole)
    _mark(whole, shtab.FILE)
    keys = " ".join(sorted({f"{key.path}=" for key in all_keys()}))
    print(shtab.complete(whole, options.shell, preamble=_SETTINGS[options.shell].format(keys=keys)))
    if options.shell == "bash":
        print(_NO_BLANK, end="")
    return 0


def _mark(parser: argparse.ArgumentParser, files: Any) -> None:
    """Say of each argument what completes it, where its choices do not say so."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _mark(below, files)
        elif action.dest == "overrides":
            action.complete = dict.fromkeys(_SETTINGS, "_scl_settings")  # type: ignore[attr-defined]
        elif action.type is Path:
            action.complete = files  # type: ignore[attr-defined]
