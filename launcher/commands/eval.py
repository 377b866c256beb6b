"""`scl eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands import SUMMARIES, Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "eval",
        _eval,
        SUMMARIES["eval"],
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


def _eval(options: argparse.Namespace) -> int:
    from launcher.evaluation.room import check_room
    from launcher.folder.needed import check_path, check_run
    from launcher.terminal import importing

    # Before torch is imported, which takes seconds.
    check_run(options.run, "recipe.yaml", *(() if options.model else ("model.safetensors",)))
    if options.model is not None:
        check_path(options.model, "--model")
    if options.against is not None:
        check_run(options.against, "recipe.yaml", "model.safetensors")
    if options.out is not None:
        check_room(options.out)

    with importing("PyTorch"):
        from launcher.evaluation.report import evaluate, write
        from launcher.evaluation.show import show

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
