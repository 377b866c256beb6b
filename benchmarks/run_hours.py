"""A whole run on 8 to 1,024 GPUs, as a model: updates, reading, saving, starts after failures.

    python -m benchmarks.run_hours [--images-per-s N] [--mtbf-hours H] [--read-gb-s B] [--cached S]
    python -m benchmarks.run_hours --write      # the table of docs/scaling.md

Nothing is measured here. The terms:

    step      a dense step on one GPU, given, and the all-reduces of benchmarks.scaling; weak
              scaling, 256 images a GPU
    reading   a node reads its share of a batch, all nodes together all of it, but for what is
              cached; this hides behind the steps, and a run waits for the longer of the two
    saving    the copy to memory, which training waits for, every T
    failures  a machine fails every MTBF on average; each failure costs its noticing, a restart,
              and half of T of lost work. T is the one that costs least: √(2 · copy · MTBF of all)
              (Young 1974), at least a minute
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.common import report, table
from benchmarks.scaling import Model, Network
from data.files import atomic_write

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SAMPLES, BYTES_PER_IMAGE, BATCH = 1_281_167, 110_000, 256
# ResNet-50, its connection tensors, and SCL's step ÷ dense on 2 CPU cores at batch 32, the largest
# that was measured (RESULTS.md); on a GPU: not run.
PARAMETERS, LAYERS, SCL_OVER_DENSE = 25_557_032, 54, 1.02
TARGET = 0.9
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- hours: python -m benchmarks.run_hours --write -->", "<!-- end -->"
_DOCUMENTED = (8, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Machine:
    """What a run meets: seconds, bytes per second, hours."""

    images_per_s: float
    gpus_per_node: int
    node_read: float
    shared_read: float
    mtbf_node_h: float
    notice_s: float
    restart_s: float
    copy_s: float
    cached: float


@dataclass(frozen=True)
class Run:
    """Hours of a run by what they are spent on."""

    gpus: int
    epochs: int
    updates: float
    communication: float
    reading: float
    saving: float
    failures: float
    every_minutes: float

    @property
    def total(self) -> float:
        return self.updates + self.communication + self.reading + self.saving + self.failures

    @property
    def efficiency(self) -> float:
        """Of what so many GPUs could do if nothing but updates took time."""
        return self.updates / self.total


def run_of(machine: Machine, gpus: int, epochs: int) -> Run:
    """The model, for SCL on ResNet-50."""
    nodes = -(-gpus // machine.gpus_per_node)
    compute = BATCH / machine.images_per_s * SCL_OVER_DENSE
    network = Network(machine.gpus_per_node, 450e9, 50e9, 5e-6)
    step = Model(network, {"scl": compute}, PARAMETERS, LAYERS).step("scl", gpus)
    steps = epochs * SAMPLES / (BATCH * gpus)
    # Of a step's images a node reads its share; all nodes together read all of them.
    of_step = BATCH * gpus * BYTES_PER_IMAGE * (1 - machine.cached)
    reading = max(of_step / nodes / machine.node_read, of_step / machine.shared_read)
    waiting = max(0.0, reading - step)
    work = steps * (step + waiting)
    mtbf = 3600 * machine.mtbf_node_h / nodes
    every = max(60.0, math.sqrt(2 * machine.copy_s * mtbf))
    saving = work / every * machine.copy_s
    lost = machine.notice_s + machine.restart_s + every / 2
    # Failures come while the lost work is made up for as well.
    failures = (work + saving) * (lost / mtbf) / max(1e-9, 1 - lost / mtbf)
    hours = [
        s / 3600
        for s in (steps * compute, steps * (step - compute), steps * waiting, saving, failures)
    ]
    return Run(gpus, epochs, *hours, every_minutes=every / 60)


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images-per-s",
        type=float,
        default=2900,
        help="dense ResNet-50 on one GPU (default: %(default)g; Lambda's figures for PyTorch: "
        "2,790 on one H100, 3,079 on one H200)",
    )
    parser.add_argument("--epochs", type=int, default=90, help="default: %(default)s")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--node-gb-s", type=float, default=5.0, help="reads of a node (%(default)g)"
    )
    parser.add_argument("--read-gb-s", type=float, default=40.0, help="reads of all (%(default)g)")
    parser.add_argument(
        "--mtbf-hours",
        type=float,
        default=6300,
        help="of one node of 8 GPUs (default: %(default)g: 419 failures in 54 days on Llama 3's "
        "16,384 H100, arXiv 2407.21783)",
    )
    parser.add_argument("--notice-s", type=float, default=300, help="default: %(default)g")
    parser.add_argument("--restart-s", type=float, default=180, help="default: %(default)g")
    parser.add_argument(
        "--copy-s", type=float, default=0.5, help="what a save holds training up (%(default)g)"
    )
    parser.add_argument(
        "--cached",
        type=float,
        default=0.0,
        help="share of what is read that a node's own memory or disk has, 0 to 1 (%(default)g)",
    )
    parser.add_argument(
        "--write", action="store_true", help="put the table of the defaults into docs/scaling.md"
    )
    return parser.parse_args(arguments)


def machine_of(options: argparse.Namespace) -> Machine:
    return Machine(
        options.images_per_s,
        options.gpus_per_node,
        1e9 * options.node_gb_s,
        1e9 * options.read_gb_s,
        options.mtbf_hours,
        options.notice_s,
        options.restart_s,
        options.copy_s,
        options.cached,
    )


def main() -> None:
    options = read_options()
    machine = machine_of(options)
    if options.write:
        text = DOCUMENT.read_text()
        before, rest = text.split(BEGIN)
        made = documented(machine, options.epochs)
        atomic_write(DOCUMENT, f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}")
    print(f"assumed, not measured: {machine}")
    runs = [run_of(machine, gpus, options.epochs) for gpus in GPUS]
    header = ["GPUs", "hours", "updates", "network", "reading", "saving", "failures", "efficiency"]
    rows = [
        [
            f"{run.gpus:,}",
            f"{run.total:.3f}",
            *(f"{part / run.total:.1%}" for part in parts_of(run)),
            f"{run.efficiency:.1%}",
        ]
        for run in runs
    ]
    print(table(header, rows))
    report(
        "run_hours",
        ratio=runs[-1].efficiency,
        target=TARGET,
        device=torch.device("cpu"),
        details={str(run.gpus): {**vars(run), "total": run.total} for run in runs},
    )


def documented(machine: Machine, epochs: int) -> str:
    """The table of the document: with every image read anew, and with the set in the nodes."""
    head = [
        "GPUs",
        "hours, read anew",
        "waiting for reads",
        "hours, cached",
        "efficiency",
        "failures",
    ]
    lines = [head, ["---"] * len(head)]
    for gpus in _DOCUMENTED:
        anew, cached = (
            run_of(replace(machine, cached=share), gpus, epochs) for share in (0.0, 1.0)
        )
        lines.append(
            [
                f"{gpus:,}",
                f"{anew.total:.3f}",
                f"{anew.reading / anew.total:.0%}".replace("%", " %"),
                f"{cached.total:.3f}",
                f"{cached.efficiency:.1%}".replace("%", " %"),
                f"{cached.failures / cached.total:.1%}".replace("%", " %"),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parts_of(run: Run) -> list[float]:
    """Hours by what they are spent on."""
    return [run.updates, run.communication, run.reading, run.saving, run.failures]


if __name__ == "__main__":
    main()
