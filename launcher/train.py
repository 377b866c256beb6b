"""One rank of a run: the program that launchers start, one process per GPU or CPU rank.

    deepspeed --num_accelerators 2 --no_local_rank launcher/train.py --recipe recipes/….yaml
    torchrun --nproc_per_node 2 launcher/train.py --recipe recipes/….yaml
    srun python -m launcher.train --recipe recipes/….yaml

`scl train` does not: it forks its ranks (launcher/run/spawn.py).

Each data worker imports this module anew, as Python's multiprocessing does with a main module:
whatever is imported here at the top costs its time and memory once per worker.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Started as a file: where its package lies comes first on the path, in place of its folder,
    # whose files are no modules.
    root = Path(__file__).resolve().parent
    while (root / "__init__.py").exists():
        root = root.parent
    sys.path[0] = str(root)

from launcher.arguments import (
    add_continue_with,
    add_recipe_options,
    changing,
    spelled_out,
)
from launcher.terminal import forgive, say


def main(arguments: list[str] | None = None) -> int:
    """Entry point of a rank. Exit codes: 0 done, 2 usage, 1 failed, 128 + n stopped by signal n."""
    forgive()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    parser = argparse.ArgumentParser(
        prog="launcher/train.py", description="One rank of a training run; see also `scl train`."
    )
    add_recipe_options(parser)
    add_continue_with(parser)
    # DeepSpeed's launcher adds it; the environment, which it sets too, says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    words = spelled_out(sys.argv[1:] if arguments is None else arguments, top_level=True)
    options = parser.parse_args([*words])

    from launcher.cluster.world import find_world
    from launcher.errors import UserError
    from launcher.recipe.load import load_recipe
    from launcher.recipe.trial import as_trial
    from launcher.run.prepare import prepare
    from launcher.run.rank import run_rank

    try:
        world = find_world()
    except UserError as error:
        say(f"error: {error}")
        return error.exit_code
    return run_rank(
        world,
        lambda: prepare(
            as_trial(load_recipe(options.recipe, [*options.overrides, *options.continue_with])),
            world.world_size,
            is_main=world.is_main,
            changing=changing(options),
        ),
    )


if __name__ == "__main__":
    code = main()
    from launcher.cluster.process import end_process

    end_process(code)
