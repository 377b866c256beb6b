"""`scl bench`."""

from __future__ import annotations

import argparse

from launcher.commands import SUMMARIES, Commands, add_command
from launcher.commands.export import add_source_options, described

_MORE = """\
Dense, without its dead features, with batch norm folded, as 2:4 (CUDA only), in onnxruntime, in our
own runtime (scl export --format native), and in OpenVINO where it is installed.
Each round times all of them in turn, so that a machine whose speed drifts treats them alike. The
last line is JSON.

example:
  scl bench runs/digits_scl --batch 1,8,32 --threads 1,2 --memory"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "bench", _bench, SUMMARIES["bench"], _MORE)
    add_source_options(parser, "MODEL")
    parser.add_argument(
        "--batch", default="1,32", metavar="N[,N…]", help="batch sizes (default: 1,32)"
    )
    parser.add_argument("--threads", metavar="N[,N…]", help="threads (default: one per core)")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each (default: 30)")
    parser.add_argument(
        "--memory", action="store_true", help="the peak of each too, in a process of its own"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one; in float16"
    )


def _bench(options: argparse.Namespace) -> int:
    from launcher.bench.asked import Asked
    from launcher.export.asked import check_source

    batches = _numbers("--batch", options.batch, "1,32")
    threads = options.threads and _numbers("--threads", options.threads, "1,2")
    asked = Asked(batches, threads or None, options.rounds, options.device, options.memory)
    asked.check()
    check_source(options.source)

    # Not before all is known to be there: they import torch, which takes seconds.
    from launcher.terminal import importing, say

    with importing("PyTorch"):
        from launcher.bench.measure import bench
        from launcher.bench.show import show
        from launcher.export.source import open_source

    show(bench(open_source(options.source, described(options)), asked, say))
    return 0


def _numbers(option: str, text: str, example: str) -> tuple[int, ...]:
    from launcher.errors import UsageError

    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: should be numbers, such as {example}") from None
