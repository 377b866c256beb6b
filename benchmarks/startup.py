"""How long a user waits: from the command to the first update, from the last one to the prompt.

    python -m benchmarks.startup [--ranks N] [--rounds N] [--quick]

Trains the digits with `recipes/digits_scl.yaml`, in few epochs, and says when what happens on rank
0 (benchmarks/moments.py runs the command and watches it); with an offline W&B run, as without a
key, and without one. "To prompt" is all that follows the last update: the evaluation and the
checkpoint of the last epoch, the results, the pictures, the end of every process. matplotlib is
imported in the background from the end of the first epoch on, and W&B started beside the first
updates: a run of a single epoch, or one that logs before W&B is there, waits for these. Then times
what says something and ends: help, `scl recipe`, usage errors. Medians; the last line is a JSON
object, whose ratio is the worst of time ÷ target.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import options_parser, parse, report, table
from benchmarks.moments import MARK

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/digits_scl.yaml"
SCL = (sys.executable, "-m", "launcher.cli")
START, END = "first update", "prompt"
TARGETS = {START: 8.0, END: 1.0}
# What says something and ends → the command, seconds it may take, its exit code.
SHORT = {
    "scl --help": (["--help"], 0.3, 0),
    "scl recipe": (["recipe"], 1.5, 0),
    "scl compare --help": (["compare", "--help"], 1.5, 0),
    "unknown option": (["train", "--recipe", RECIPE, "--nothing"], 1.5, 2),
    "unknown key": (["train", "--recipe", RECIPE, "--set", "method.lamb=1"], 1.5, 2),
    "no such recipe": (["train", "--recipe", "none.yaml"], 1.5, 2),
    "no such run": (["eval", "none"], 1.5, 2),
}
# In order: what each stage is called → the moment at which it is over.
BEFORE = {
    "Python, launcher and recipe": "imported",
    "checks of data and model": "checked",
    "fork": "forked",
    "meeting the others": "met",
    "model and engine": "built",
    "tracker": "tracker",
    "first batch": "batch",
    "first update": "update",
}
AFTER = {
    "evaluation": "evaluated",
    "checkpoint": "saved",
    "results and pictures": "results",
    "end of all processes": "end",
}


def environment(wandb: str) -> dict[str, str]:
    """No launcher's variables, no key: as on a machine where nothing has been set up."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "WANDB"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return kept | {"WANDB_MODE": wandb, "TERM": "dumb"}


def seconds_of(arguments: list[str], code: int) -> float:
    """How long `scl` takes with these arguments. Raises RuntimeError if it ends otherwise."""
    began = time.perf_counter()
    ended = subprocess.run(
        [*SCL, *arguments], cwd=ROOT, env=environment("offline"), capture_output=True
    )
    taken = time.perf_counter() - began
    if ended.returncode != code:
        raise RuntimeError(f"scl {' '.join(arguments)} ended with {ended.returncode}, not {code}")
    return taken


def train(shards: Path, run: Path, ranks: int, epochs: int, wandb: str) -> dict[str, float]:
    """Seconds of each stage of one run, and the sums `first update` and `prompt`."""
    command = [sys.executable, "-m", "benchmarks.moments", "train", "--recipe", RECIPE]
    settings = [f"run_dir={run}", f"data.path={shards}", f"optim.epochs={epochs}"]
    settings += ["tracking.wandb=off"] if wandb == "off" else []
    for setting in settings:
        command += ["--set", setting]
    began = time.time()
    ended = subprocess.run(
        [*command, "--ranks", str(ranks)],
        cwd=ROOT,
        env=environment("offline"),
        capture_output=True,
        text=True,
    )
    end = time.time()
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ended.stderr}")
    return stages(ended.stderr, began, end)


def stages(output: str, began: float, end: float) -> dict[str, float]:
    """Seconds of each stage, from the moments that a run has said."""
    said = [line.split()[1:] for line in output.splitlines() if line.startswith(MARK)]
    first: dict[str, float] = {}
    last = {"end": end}
    for name, at in said:
        first.setdefault(name, float(at))
        last[name] = float(at)
    taken = {}
    then = began
    for stage, moment in BEFORE.items():
        taken[stage], then = first[moment] - then, first[moment]
    taken[f"to {START}"] = then - began
    then = last["update"]
    for stage, moment in AFTER.items():
        taken[stage], then = last[moment] - then, last[moment]
    taken[f"to {END}"] = then - last["update"]
    return taken


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def measure(
    rounds: int, ranks: int, epochs: int
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Medians: of the stages of runs with W&B offline and off, and of what ends at once."""
    runs: dict[str, list[dict[str, float]]] = {"offline": [], "off": []}
    short: dict[str, list[float]] = {name: [] for name in SHORT}
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "digits"
        seconds_of(["pack", "digits", "--out", str(shards)], 0)
        for number in range(rounds):
            for name, (arguments, _, code) in SHORT.items():
                short[name].append(seconds_of(arguments, code))
            for wandb, taken in runs.items():
                run = Path(folder) / f"{wandb}-{number}"
                taken.append(train(shards, run, ranks, epochs, wandb))
    return (
        {wandb: medians(taken) for wandb, taken in runs.items()},
        {name: statistics.median(taken) for name, taken in short.items()},
    )


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run (default: 2)")
    parser.add_argument("--rounds", type=int, help="runs of each (default: 5)")
    options = parse(parser)
    rounds = options.rounds or (1 if options.quick else 5)
    epochs = 2 if options.quick else 5
    runs, short = measure(rounds, options.ranks, epochs)
    print(f"{RECIPE}, {options.ranks} ranks, {epochs} epochs, medians of {rounds}")
    rows = [[stage, *(f"{taken[stage]:.2f} s" for taken in runs.values())] for stage in runs["off"]]
    print(table(["", *(f"W&B {wandb}" for wandb in runs)], rows))
    print(
        table(["", "", "target"], [[n, f"{s:.2f} s", f"{SHORT[n][1]} s"] for n, s in short.items()])
    )
    ratios = [taken[f"to {name}"] / aim for taken in runs.values() for name, aim in TARGETS.items()]
    ratios += [taken / SHORT[name][1] for name, taken in short.items()]
    report(
        "startup",
        ratio=max(ratios),
        target=1.0,
        device=torch.device(options.device),
        details={"rounds": rounds, "ranks": options.ranks, "seconds": runs, "commands": short},
    )


if __name__ == "__main__":
    main()
