"""One shrinking, in one cut or cut by cut."""

from __future__ import annotations

import torch

from launcher.errors import UsageError
from launcher.export.source import Described, open_source
from launcher.shrink.anneal import anneal
from launcher.shrink.asked import REPORT, Asked
from launcher.shrink.cutting import begin, make_cut
from launcher.shrink.ways import Say


def shrink(asked: Asked, said: Described, say: Say) -> int:
    """Make the network `asked.source` smaller, in the folder `asked.out`. Returns the exit code.

    In one cut without training, the folder appears when all is done. Otherwise it holds each cut
    in `cuts/`, with the run that fine-tunes it, and the same command goes on after the last one
    that is finished. Raises UsageError before anything is written.
    """
    # Ranks are forked from here: threads that exist by then would be missing in them.
    torch.set_num_threads(1)
    source = open_source(asked.source, said)
    if (asked.out / REPORT).is_file():
        say(f"{asked.out} is finished; choose another --out to shrink again")
        return 0
    if asked.in_one:
        make_cut(asked, source, source, asked.out, 1, begin(asked, source, say), say)
        return 0
    if source.recipe is None:
        raise UsageError(
            f"{asked.source} has no recipe to be fine-tuned by: give a run, or leave out --cuts "
            "and --epochs"
        )
    return anneal(asked, source)
