"""`scl sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.arguments import add_overrides
from launcher.commands import SUMMARIES, Commands, add_command

if TYPE_CHECKING:
    from launcher.start.sweep import SweepRun

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

examples:
  scl sweep recipes/paper/lambda.yaml --dry-run
  scl sweep recipes/paper/lambda.yaml --task 3    as a task of a cluster's array does

Under Slurm: SCL_SWEEP=recipes/paper/lambda.yaml sbatch --array=0-26 slurm/sweep.sh"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "sweep", _sweep, SUMMARIES["sweep"], _MORE)
    parser.add_argument("file", type=Path, help="YAML file, as below")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: as many as cores or GPUs)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and list the runs; start none"
    )
    parser.add_argument(
        "--task",
        type=int,
        metavar="N",
        help="train the N-th run alone, from 0, as scl train does; also as a rank of srun's",
    )
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="where the folder of the sweep is (default: runs)"
    )
    add_overrides(parser)


def _sweep(options: argparse.Namespace) -> int:
    from launcher.errors import UsageError
    from launcher.recipe.shipped import find_recipe
    from launcher.start.sweep import load_sweep, plan_sweep
    from launcher.terminal import importing, say

    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs is {options.jobs}; it must be at least 1")
    file = find_recipe(options.file)
    sweep = load_sweep(file, options.runs)
    runs = plan_sweep(sweep, file, options.overrides)
    if options.task is not None:
        return _train_one(runs, options.task, options.file)

    # Not before all recipes are known to be sound: it imports torch, which takes seconds.
    with importing("PyTorch"):
        from launcher.start.sweep_jobs import check_runs, default_jobs, run_all

    standings = check_runs(runs)
    if options.dry_run:
        for number, standing in enumerate(standings):
            print(f"{number:>3}  {standing.run.recipe.folder}  ({standing.phrase})")
        last = len(standings) - 1
        say(f"under Slurm: SCL_SWEEP={options.file} sbatch --array=0-{last} slurm/sweep.sh")
        return 0
    jobs = options.jobs or default_jobs(runs)
    left = sum(not standing.finished for standing in standings)
    say(f"{sweep.name}: {len(runs)} runs, {left} to train, {jobs} at a time, in {sweep.folder}")
    code = run_all(standings, jobs)
    say(f"to compare them: scl compare {sweep.folder}")
    return code


def _train_one(runs: list[SweepRun], number: int, file: Path) -> int:
    from launcher.cluster.world import find_world
    from launcher.errors import UsageError
    from launcher.terminal import say

    if not 0 <= number < len(runs):
        raise UsageError(
            f"--task {number}: {file} has {len(runs)} runs, 0 to {len(runs) - 1}; a job array of "
            f"all is --array=0-{len(runs) - 1}"
        )
    run = runs[number]
    if find_world().is_main:
        say(f"{run.name}: checking the data and the model")
    from launcher.start.train import train

    return train(run.recipe)
