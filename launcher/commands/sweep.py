"""`scl sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands import SUMMARIES, Commands, add_command

_MORE = """\
The file:

  name: lambdas
  seeds: [0, 1, 2]
  set: {optim.epochs: 40}                     for all runs
  runs:
    - recipe: ../recipes/digits_scl.yaml      relative to this file
      set: {method.lam: [0.2, 0.28, 0.4]}     lists are tried, and multiply out
    - recipe: ../recipes/digits_dense.yaml

Nine and three runs, in runs/lambdas/digits_scl-lam0.2-seed0 and so on. What is finished is left
alone and what was interrupted continues, so the same command goes on after anything.

example:
  scl sweep recipes/paper/lambda.yaml --dry-run"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "sweep", _sweep, SUMMARIES["sweep"], _MORE)
    parser.add_argument("file", type=Path, help="YAML file, as below")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: as many as cores or GPUs)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and list the runs; start none"
    )


def _sweep(options: argparse.Namespace) -> int:
    from launcher.errors import UsageError
    from launcher.start.sweep import load_sweep, plan_sweep
    from launcher.terminal import Waiting, say

    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs is {options.jobs}; it must be at least 1")
    sweep = load_sweep(options.file)
    runs = plan_sweep(sweep, options.file)

    # Not before all recipes are known to be sound: it imports torch, which takes seconds.
    with Waiting("importing PyTorch"):
        from launcher.start.sweep_jobs import check_runs, default_jobs, run_all

    standings = check_runs(runs)
    if options.dry_run:
        for standing in standings:
            print(f"{standing.run.recipe.folder}  ({standing.phrase})")
        return 0
    jobs = options.jobs or default_jobs(runs)
    left = sum(not standing.finished for standing in standings)
    say(f"{sweep.name}: {len(runs)} runs, {left} to train, {jobs} at a time, in {sweep.folder}")
    code = run_all(standings, jobs)
    say(f"to compare them: scl compare {sweep.folder}")
    return code
