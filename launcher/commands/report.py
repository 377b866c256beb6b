"""`scl report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands import SUMMARIES, Commands, add_command
from launcher.terminal import Waiting, importing


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        _report,
        SUMMARIES["report"],
        "example:\n  scl report runs/digits_scl",
    )
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/digits_scl")


def _report(options: argparse.Namespace) -> int:
    from launcher.folder.results import read_run

    # What cannot be read is said before matplotlib is imported.
    read_run(options.run)

    with importing("Matplotlib"):
        from launcher.reports import mask_picture, picture, report

    with Waiting("drawing"):
        drawn = [picture.draw(options.run), mask_picture.draw(options.run)]
    for path in filter(None, drawn):
        print(path)
    report.show(options.run)
    return 0
