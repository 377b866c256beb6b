"""`scl compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands import SUMMARIES, Commands, add_command
from launcher.terminal import Waiting

_MORE = """\
RUN is the folder of a run, a folder of runs such as that of a sweep, or entity/project or
entity/project/run_id of W&B. Runs that differ in nothing but their seed are one line: mean ± sample
standard deviation.

Written to --out: index.html, a page of its own with all tables and figures; accuracy.png,
curves.png, layers.png; table.csv and table.json.

example:
  scl compare runs/digits_scl runs/digits_dense --out runs/compare"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "compare", _compare, SUMMARIES["compare"], _MORE)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="see below")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="default: runs/compare"
    )
    parser.add_argument(
        "--sort",
        choices=("density", "top1", "macs", "time", "throughput"),
        default="density",
        help="order of the lines (default: density)",
    )
    parser.add_argument(
        "--milliseconds",
        action="store_true",
        help="accuracy over latency too: measured here, in the native runtime, batch 1",
    )


def _compare(options: argparse.Namespace) -> int:
    from launcher.compare import check_out, compare_runs, show, write

    check_out(options.out)
    with Waiting("reading the runs", first=1.0):
        comparison = compare_runs(options.runs, options.sort, options.milliseconds)
    show(comparison)
    with Waiting("drawing"):
        written = write(comparison, options.out)
    for path in written:
        print(path)
    return 0
