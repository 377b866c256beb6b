"""`scl doctor`."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands import SUMMARIES, Commands, add_command
from launcher.terminal import Waiting, importing

if TYPE_CHECKING:
    from data.shards.doctor import Diagnosis

_SHOWN = 50
_MORE = """\
Exit code 0: all is sound; 1: something is not, each on a line: file, key of the sample, reason.
Without --quick every byte is read and every image decoded.

examples:
  scl doctor runs/data/digits                               are the shards sound?
  scl doctor --cluster --recipe recipes/digits_scl.yaml     could this machine train it?
  sbatch --nodes=4 slurm/doctor.sh                          could the nodes of a job?"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "doctor", _doctor, SUMMARIES["doctor"], _MORE)
    parser.add_argument(
        "shards",
        type=Path,
        nargs="*",
        metavar="SHARDS",
        help="folder with train/ and val/, or one split",
    )
    parser.add_argument(
        "--quick", action="store_true", help="manifest, index and sizes only: no shard is read"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: one per core)",
    )
    _add_cluster_options(parser)


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    nodes = parser.add_argument_group("nodes instead of shards")
    nodes.add_argument(
        "--cluster",
        action="store_true",
        help="check this machine, and started as ranks by srun, deepspeed or torchrun, all nodes",
    )
    nodes.add_argument("--recipe", type=Path, help="what is to be trained there")
    nodes.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="override one key of the recipe; may be repeated",
    )
    nodes.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long ranks may take to come (default: 60)",
    )


def _doctor(options: argparse.Namespace) -> int:
    from launcher.errors import UsageError

    if options.cluster:
        return _check_cluster(options)
    if not options.shards:
        raise UsageError("nothing to check: name a folder of shards, as in `scl doctor DIR`")
    if options.workers < 1:
        raise UsageError(f"--workers is {options.workers}; it must be at least 1")
    # Before what decodes images is imported, and torch with it.
    for folder in options.shards:
        if not folder.exists():
            raise UsageError(f"there is no folder {folder}; name one that holds shards")
    return _check_shards(options.shards, options.quick, options.workers)


def _check_cluster(options: argparse.Namespace) -> int:
    from launcher.errors import UsageError

    if options.recipe is None:
        raise UsageError("--cluster checks nodes for a recipe: name it with --recipe FILE")
    if options.shards:
        raise UsageError("--cluster takes the shards from the recipe: leave them out")
    try:
        from launcher.cluster.world import find_world
        from launcher.recipe.load import load_recipe

        recipe = load_recipe(options.recipe, options.overrides)

        with importing("PyTorch"):
            from launcher.doctor.check import check_cluster
    except ImportError as error:
        raise UsageError(
            f"the environment of this node is not complete ({error}): install it, or let all nodes "
            "use one (SCL_VENV or SCL_CONTAINER)"
        ) from error
    world = find_world()
    with Waiting("checking the nodes") if world.is_main else contextlib.nullcontext():
        return check_cluster(recipe, world, options.timeout)


def _check_shards(folders: list[Path], quick: bool, workers: int) -> int:
    with importing("what checking needs"):
        from data.files import explained
        from data.shards.doctor import examine, find_splits

    with explained(folders[0]):
        splits = [split for folder in folders for split in find_splits(folder)]
    diagnoses = [examine(split, quick=quick, workers=workers) for split in splits]
    for diagnosis in diagnoses:
        _show(diagnosis, quick)
    return int(any(diagnosis.problems for diagnosis in diagnoses))


def _show(diagnosis: Diagnosis, quick: bool) -> None:
    for problem in diagnosis.problems[:_SHOWN]:
        print(problem)
    if len(diagnosis.problems) > _SHOWN:
        print(f"… and {len(diagnosis.problems) - _SHOWN:,} more in {diagnosis.folder}")
    for note in diagnosis.notes:
        print(f"{diagnosis.folder}: note: {note}")
    count = len(diagnosis.problems)
    verdict = "sound" if not count else "1 problem" if count == 1 else f"{count:,} problems"
    how = " (sizes and index only)" if quick else ""
    print(
        f"{diagnosis.folder}: {verdict}{how}; {diagnosis.samples:,} samples in "
        f"{diagnosis.shards} shards"
    )
