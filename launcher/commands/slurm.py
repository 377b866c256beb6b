"""`scl slurm`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands import SUMMARIES, Commands, add_command

_MORE = """\
They go into ./slurm, to be submitted from this folder, by which they know each other; account,
partition and times are yours to set, in the scripts or as options of sbatch (docs/cluster.md). What
is there already is kept. In a checkout they are there. Then: sbatch slurm/resnet50_scl.sh

example:
  scl slurm"""


def add(commands: Commands) -> None:
    add_command(commands, "slurm", _slurm, SUMMARIES["slurm"], _MORE)


def _slurm(options: argparse.Namespace) -> int:
    from data.files import atomic_write
    from launcher.errors import UsageError
    from launcher.recipe.shipped import SLURM

    folder = Path("slurm")
    ours = {folder / file.name: file.read_text(encoding="utf-8") for file in SLURM.glob("*.sh")}
    there = {file: file.read_text(encoding="utf-8") for file in ours if file.exists()}
    if changed := sorted(str(file) for file in there if there[file] != ours[file]):
        raise UsageError(
            f"{', '.join(changed)}: there already, and not as in this version of SCL: move them "
            "away to get its own"
        )
    folder.mkdir(exist_ok=True)
    for file in ours.keys() - there.keys():
        atomic_write(file, ours[file])
    print(*sorted(map(str, ours)), sep="\n")
    return 0
