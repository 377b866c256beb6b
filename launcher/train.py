"""One rank of a run: the program that every launcher starts, one process per GPU or CPU rank.

    deepspeed --num_accelerators 2 --no_local_rank launcher/train.py --recipe recipes/….yaml
    torchrun --nproc_per_node 2 launcher/train.py --recipe recipes/….yaml
    srun python -m launcher.train --recipe recipes/….yaml

Each data worker imports this module anew, as Python's multiprocessing does with a main module:
whatever is imported here at the top costs its time and memory once per worker.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Started as a file: the packages of the repository are beside this one.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher.arguments import add_recipe_options
from launcher.terminal import say

_OTHERS_END_WITHIN_S = 10


def main(arguments: list[str] | None = None) -> int:
    """Entry point of a rank. Exit codes: 0 done, 2 usage, 1 failed, 128 + n stopped by signal n."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    parser = argparse.ArgumentParser(
        prog="launcher/train.py", description="One rank of a training run; see also `scl train`."
    )
    add_recipe_options(parser)
    options = parser.parse_args(arguments)

    from tqdm.contrib.logging import logging_redirect_tqdm

    from data.errors import DataError
    from launcher.checkpoints.checkpoint import CheckpointError
    from launcher.cluster.world import find_world
    from launcher.errors import RunError, UsageError
    from launcher.loop import run_rank
    from launcher.recipe import load_recipe

    world = None
    try:
        world = find_world()
        world.export()
        with logging_redirect_tqdm():
            return run_rank(load_recipe(options.recipe, options.overrides), world)
    except (UsageError, DataError, CheckpointError, RunError) as error:
        if world is None or world.is_main:
            say(f"error: {error}")
        else:
            # All ranks come to the same verdict and rank 0 says it; then the launcher ends this
            # one. Unless only this one is in trouble: its node may lack the data.
            time.sleep(_OTHERS_END_WITHIN_S)
            say(f"error: rank {world.rank}: {error}")
        return 1 if isinstance(error, RunError) else 2
    except Exception as error:
        where = f"rank {world.rank}" if world else "this process"
        if is_lost_connection(error):
            say(f"{where} ends because another rank did: {str(error).splitlines()[0]}")
            # Launchers report the first to end. That must be the rank that broke: it is gone
            # already, but a launcher that looks once a second could see this one before it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_OTHERS_END_WITHIN_S)
        else:
            say(f"error: {where} failed:\n{traceback.format_exc()}")
        return 1


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because a peer is gone: an effect, never the first cause."""
    import torch.distributed

    if isinstance(error, torch.distributed.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


if __name__ == "__main__":
    code = main()
    if code == 0:
        # All is written: a signal from here on must not make a failure of it.
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # The interpreter's own exit waits for threads of collectives that will never complete, and
        # for W&B's service, which a signal to all processes of a rank has ended already.
        os._exit(code)
