"""`scl shrink`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.arguments import add_overrides
from launcher.commands import SUMMARIES, Commands, add_command
from launcher.commands.export import add_source_options, described

_MORE = """\
latency     units that matter least per millisecond go until the network takes --latency-ms, or
            --latency 50% of today's: promised from a table of layers measured here, then measured
dependence  units that are linear combinations of others go, and their readers take them over:
            without loss (as far as the images show), or --share 10%: those that come nearest to it
votes       images vote for the units they need; the --share with the fewest votes goes

DIR gets model.safetensors, cut.json, shrink.json and recipe.yaml, which `scl train` takes to
fine-tune it. With --cuts or --epochs each cut is fine-tuned by the source's recipe, and kept while
top-1 loses no more than --tolerance points; the same command goes on after an interruption.

examples:
  scl shrink runs/digits_dense --by latency --latency 50% --out runs/digits_fast
  scl shrink runs/digits_dense --by dependence --out runs/digits_lossless
  scl shrink runs/digits_dense --by votes --share 20% --cuts 8 --epochs 4 --out runs/digits_voted"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "shrink", _shrink, SUMMARIES["shrink"], _MORE)
    add_source_options(parser, "SOURCE")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new")
    ways = ("latency", "dependence", "votes")
    parser.add_argument("--by", choices=ways, required=True, help="how units are chosen, see below")
    parser.add_argument("--share", help="dependence, votes: units that one cut takes, such as 10%%")
    latency = parser.add_argument_group("of --by latency")
    latency.add_argument("--latency-ms", type=float, metavar="MS", help="milliseconds for a batch")
    latency.add_argument("--latency", metavar="SHARE", help="share of today's, such as 50%%")
    latency.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    latency.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads (default: 1, timed by processor time; several by the clock)",
    )
    latency.add_argument("--rounds", type=int, default=20, help="timings of each (default: 20)")
    annealing = parser.add_argument_group("cut by cut")
    annealing.add_argument("--cuts", type=int, default=1, help="cuts at most (default: 1)")
    annealing.add_argument(
        "--epochs", type=int, default=0, help="epochs of fine-tuning after each cut (default: 0)"
    )
    annealing.add_argument(
        "--tolerance",
        type=float,
        default=0.5,
        metavar="POINTS",
        help="top-1 on the validation split that all cuts may lose together (default: 0.5)",
    )
    add_overrides(annealing)
    parser.add_argument(
        "--samples", type=int, default=1024, help="training images to judge by (default: 1024)"
    )
    parser.add_argument("--data", help="shards to use instead of the recipe's data.path")


def _shrink(options: argparse.Namespace) -> int:
    from launcher.export.asked import check_source
    from launcher.shrink.asked import REPORT, Asked, check_asked, share_of

    asked = Asked(
        source=options.source,
        out=options.out,
        by=options.by,
        share=None if options.share is None else share_of("--share", options.share),
        latency_ms=options.latency_ms,
        latency=None if options.latency is None else share_of("--latency", options.latency),
        batch=options.batch,
        threads=options.threads,
        rounds=options.rounds,
        samples=options.samples,
        cuts=options.cuts,
        epochs=options.epochs,
        tolerance=options.tolerance,
        data=options.data,
        overrides=tuple(options.overrides),
    )
    check_asked(asked)
    check_source(asked.source)

    # Not before all is known to be there: they import torch, which takes seconds.
    from launcher.terminal import importing, say

    with importing("PyTorch"):
        from launcher.shrink.show import show
        from launcher.shrink.shrink import shrink

    code = shrink(asked, described(options), say)
    if code == 0:
        show(options.out / REPORT)
    return code
