"""`scl eval | report | recipe`: what there is to see of runs and recipes."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands import Commands, add_command


def add(commands: Commands) -> None:
    """Add the three subcommands."""
    _add_eval(commands)
    _add_report(commands)
    _add_recipe(commands)


def _add_eval(commands: Commands) -> None:
    parser = add_command(
        commands,
        "eval",
        _eval,
        "evaluate the written model of a run",
        "examples:\n"
        "  scl eval runs/digits_scl\n"
        "  scl eval runs/digits_scl --against runs/digits_dense --out runs/eval",
    )
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/digits_scl")
    parser.add_argument("--split", default="val", help="split to evaluate on (default: val)")
    parser.add_argument(
        "--data", help="shards, or a folder of class folders, instead of the recipe's data.path"
    )
    parser.add_argument(
        "--against", type=Path, metavar="RUN", help="a dense run, to see which classes pay"
    )
    parser.add_argument("--model", type=Path, metavar="FILE", help="weights instead of the run's")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write eval.json and eval.png")


def _add_report(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        _report,
        "draw the pictures of a run, show its table; also while it is trained",
        "example:\n  scl report runs/digits_scl",
    )
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/digits_scl")


def _add_recipe(commands: Commands) -> None:
    add_command(
        commands,
        "recipe",
        _recipe,
        "list every key of a recipe with default and meaning",
        "example:\n  scl recipe | less",
    )


def _eval(options: argparse.Namespace) -> int:
    from launcher.evaluation.report import check_room, evaluate, write
    from launcher.evaluation.show import show

    if options.out is not None:
        check_room(options.out)
    report = evaluate(
        options.run,
        against=options.against,
        split=options.split,
        data=options.data,
        model=options.model,
    )
    show(report)
    if options.out is not None:
        for path in write(report, options.out):
            print(path)
    return 0


def _report(options: argparse.Namespace) -> int:
    from launcher.reports import mask_picture, picture, report

    print(picture.draw(options.run))
    if (masks := mask_picture.draw(options.run)) is not None:
        print(masks)
    report.show(options.run)
    return 0


def _recipe(options: argparse.Namespace) -> int:
    from launcher.recipe.describe import describe

    print(describe())
    return 0
