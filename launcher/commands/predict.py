"""`scl predict`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands import SUMMARIES, Commands, add_command

_MORE = """\
Images are read, scaled and cropped as in the run's own evaluation. One that cannot be read is
named, has empty fields in the table, and makes the exit code 1.

examples:
  scl predict runs/digits_scl seven.png
  scl predict runs/digits_scl scans/ --csv scans.csv"""


def add(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(commands, "predict", _predict, SUMMARIES["predict"], _MORE)
    parser.add_argument("run", type=Path, help="folder of a finished run, such as runs/digits_scl")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write image, class, probability and that of every class to FILE",
    )
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="classes shown of each image (default: 3)"
    )
    parser.add_argument("--model", type=Path, metavar="FILE", help="weights instead of the run's")


def _predict(options: argparse.Namespace) -> int:
    from launcher.errors import UsageError
    from launcher.folder.needed import check_path, check_run
    from launcher.terminal import importing, say

    # Before torch is imported, which takes seconds.
    check_run(options.run, "recipe.yaml", *(() if options.model else ("model.safetensors",)))
    for path in options.images:
        check_path(path, "IMAGES")
    if options.csv is not None and options.csv.exists():
        raise UsageError(f"{options.csv} is there already: choose another name with --csv")
    if options.top < 1:
        raise UsageError(f"--top is {options.top}; it must be at least 1")

    from data.files import atomic_write

    with importing("PyTorch"):
        from launcher.evaluation.classify import classify

    result = classify(options.run, options.images, model=options.model)
    for row, path in enumerate(result.images):
        if path not in result.problems:
            best = result.best(row, options.top)
            print(f"{path}: {', '.join(f'{name} {share:.1%}' for name, share in best)}")
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(options.csv, result.as_csv())
        print(options.csv)
    for path, problem in result.problems.items():
        say(f"error: {path} cannot be read: {problem}")
    return 1 if result.problems else 0
