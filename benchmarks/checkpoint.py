"""What saving costs training: a step beside a checkpoint being written ÷ a step alone.

    python -m benchmarks.checkpoint [--folder DIR] [--threads N] [--rounds N] [--quick]

One rank trains ResNet-50 by SCL on noise through the launcher's engine and saves its state as a run
does: copied to CPU memory, which training waits for, then written by a thread, hashed and synced to
the disk of `--folder`. In each round: steps alone, then a save with steps until it is written, then
a save that training waits for. Quoted are medians over rounds. The last line is a JSON object; its
ratio is that of the two steps, and its details say what one save costs a run altogether.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    Round,
    median,
    median_ratio,
    options_parser,
    parse,
    report,
    seconds,
    table,
)
from benchmarks.training import (
    WARM_UP,
    Load,
    add_threads,
    engine_and_step,
    engine_config,
    single_world,
)
from launcher.checkpoints.write import discard, open_folder, write_parts, writing_thread
from launcher.run.engine import process_group
from launcher.run.state import bytes_of, copied_to_cpu

BATCHES = {"cpu": 8, "cuda": 128}
ROUNDS = 5
STEPS_ALONE = 3
TARGET = 1.1


def state_of(engine: Any) -> dict[str, Any]:
    """What a rank saves in stage 0, but for generators: the memory that is trained on."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    states = engine.basic_optimizer.state.items()
    return {
        "model": {key: value.detach() for key, value in engine.module.state_dict().items()},
        "optimizer-00000": {
            names[id(p)]: {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
            for p, state in states
        },
    }


def one_round(
    step: Callable[[], None],
    state: dict[str, Any],
    folder: Path,
    thread: ThreadPoolExecutor,
    device: torch.device,
) -> Round:
    """Seconds of a step alone and beside the writing, of the copy, and of a save waited for."""
    alone = statistics.mean(seconds(step, device) for _ in range(STEPS_ALONE))
    began = time.perf_counter()
    copies = copied_to_cpu(state)
    copy = time.perf_counter() - began
    place = open_folder(folder, step=1)
    task = thread.submit(write_parts, place, copies)
    del copies
    beside = []
    while not task.done():
        beside.append(seconds(step, device))
    task.result()
    discard(place)
    place = open_folder(folder, step=1)
    waited = seconds(lambda: write_parts(place, copied_to_cpu(state)), device)
    discard(place)
    return {
        "alone": alone,
        "beside": statistics.mean(beside),
        "copy": copy,
        "waited": waited,
        # What the run is later for one save, in the background and waited for.
        "cost": copy + sum(beside) - len(beside) * alone,
    }


def parsed() -> argparse.Namespace:
    parser = options_parser(__doc__)
    add_threads(parser)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, help=f"saves of each kind (default: {ROUNDS})")
    return parse(parser)


def main() -> None:
    options = parsed()
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    # The state is ResNet-50's either way; only the images shrink.
    size = 64 if options.quick else 224
    load = Load("resnet50", batch=2 if options.quick else BATCHES[options.device], image_size=size)
    config = engine_config(options)
    world = single_world()
    world.export()
    with (
        process_group(world, config) as device,
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        writing_thread() as thread,
    ):
        engine, step = engine_and_step("scl", load, device, config)
        for _ in range(WARM_UP):
            step()
        state = state_of(engine)
        timed = [one_round(step, state, Path(folder), thread, device) for _ in range(rounds)]
    written = bytes_of(state)
    ratio = median_ratio(timed, "beside", "alone")
    print(f"{load.model}, batch {load.batch}, {written / 1e6:.0f} MB a checkpoint, {rounds} rounds")
    rows = [
        ["a step alone", f"{median(timed, 'alone'):.3f} s"],
        ["a step beside the writing", f"{median(timed, 'beside'):.3f} s"],
        ["the copy, which training waits for", f"{median(timed, 'copy'):.3f} s"],
        ["a save that training waits for", f"{median(timed, 'waited'):.3f} s"],
        ["what a save in the background costs", f"{median(timed, 'cost'):.3f} s"],
    ]
    print(table(["", "median"], rows))
    report(
        "checkpoint",
        ratio=ratio,
        target=TARGET,
        device=device,
        details={
            "bytes": written,
            "rounds": rounds,
            "seconds": {name: round(median(timed, name), 4) for name in timed[0]},
            "copy_share": round(median_ratio(timed, "copy", "waited"), 4),
        },
    )


if __name__ == "__main__":
    main()
