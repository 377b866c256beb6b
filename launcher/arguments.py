"""Command-line arguments that several programs have in common."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_SETTING = re.compile(r"[a-z_][a-z0-9_]*(\.[A-Za-z0-9_]+)*=")
_AS_OPTION = re.compile(r"--(?=[a-z_][a-z0-9_]*(\.[A-Za-z0-9_]+)+=)")
_TOP_LEVEL = re.compile(r"--(?=(name|run_dir|seed)=)")


def spelled_out(arguments: Iterable[str], *, top_level: bool = False) -> Iterator[str]:
    """`arguments` with one `--set` for each setting.

    Other programs write several behind one (`--set a=1 b=2`), or a key as an option
    (`--method.lam=0.2`), as W&B's agent does. `top_level`: a key without a dot (`--seed=1`) too,
    for commands that have no such option themselves.
    """
    before = ""
    for word in arguments:
        if option := _AS_OPTION.match(word) or (top_level and _TOP_LEVEL.match(word)):
            yield from ("--set", word[option.end() :])
            before = "setting"
        elif before == "--set":
            yield word
            before = "setting"
        elif before == "setting" and _SETTING.match(word):
            yield from ("--set", word)
        else:
            yield word
            before = "setting" if word.startswith("--set=") else word


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """What to train: a recipe, and overrides of single keys."""
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file, see recipes/")
    add_overrides(parser)


def add_continue_with(parser: argparse.ArgumentParser) -> None:
    """`--continue-with`, as `options.continue_with`."""
    parser.add_argument(
        "--continue-with",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="go on with the run in run_dir, finished or not, with other values: optim.epochs, "
        "optim.lr, method.lam …; what changes is recorded there",
    )


def changing(options: argparse.Namespace) -> list[str]:
    """The keys that `--continue-with` gives other values."""
    return [text.partition("=")[0] for text in options.continue_with]


def add_overrides(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """`--set`, as `options.overrides`."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="override one key of the recipe; may be repeated, or given several",
    )
