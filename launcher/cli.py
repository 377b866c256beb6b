"""`scl`: one command, of which only what was asked for is imported."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from typing import Any

from launcher.arguments import spelled_out
from launcher.cluster.process import end_process
from launcher.commands import SUMMARIES, HelpFormatter, Parser, add_commands
from launcher.terminal import forgive, say

_EXAMPLES = """\
examples:
  scl init photographs             a recipe for one's own images, and what to type next
  scl pack digits --out runs/data/digits
  scl train --recipe recipes/digits_scl.yaml
  scl train --recipe recipes/digits_scl.yaml --set method.lam=0.2 --set run_dir=runs/lam0.2
  scl sweep recipes/paper/lambda.yaml
  scl eval runs/digits_scl
  scl compare runs/digits_scl runs/digits_dense
  scl checkpoint ls runs/digits_scl
  scl export runs/digits_scl --format onnx,compact --out runs/digits_export
  scl shrink runs/digits_dense --by latency --latency 50% --out runs/digits_fast
  scl bench runs/digits_scl
  scl doctor runs/data/digits
  scl doctor --cluster --recipe recipes/digits_scl.yaml
  scl recipe                       every key of a recipe, its default and what it means

On several machines: deepspeed --hostfile HOSTS --no_local_rank launcher/train.py --recipe FILE
Under Slurm:         sbatch slurm/resnet50_scl.sh
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand. Exit codes: 0 done, 2 usage, 1 failed, 128 + n stopped by signal n."""
    forgive()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    code = _run(sys.argv[1:] if arguments is None else arguments)
    if arguments is None and not code:
        # All is written: no need to wait for the interpreter to take thousands of modules apart.
        end_process(code)
    return code


def _run(arguments: list[str]) -> int:
    asked = next((word for word in arguments if word in SUMMARIES), "")
    words = spelled_out(arguments, top_level=asked == "train")
    options = parser(asked).parse_args([*words])
    from launcher.errors import UserError

    try:
        return options.command(options)
    except UserError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        # Only while a run is prepared: one that has begun catches the signal, saves and says so.
        say("stopped by SIGINT")
        return 128 + signal.SIGINT


def parser(asked: str | None = None) -> Parser:
    """The parser of the command line, with the options of the command `asked`, or of all."""
    parser = Parser(
        prog="scl",
        description="Sparse Connectivity Learning: networks that choose their connections.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="say which version this is")
    add_commands(parser, asked)
    return parser


class _Version(argparse.Action):
    """`--version`, which looks for it only when it is asked."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"scl {version('scl-train')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
