"""Why the defaults are what they are: accuracy at equal density, one setting changed at a time.

    python -m benchmarks.defaults [--quick]

Trains a ConvNet and an MLP on scikit-learn's digits for each setting, several λ and seeds, and
reads off the top-1 at 3 % density between the two λ whose densities lie around it. Prints one
table; its last line is a JSON object. About 40 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

from data.sources.digits import digits
from launcher.models import SmallConvNet
from sclcore import SCL, Schedule, Scheduler, connection_groups

BATCH, LR, DENSITY = 64, 0.1, 0.03
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "freeze_masks_at 0.3": {"schedule": {"freeze_masks_at": 0.3}},
    "freeze_masks_at 0.7": {"schedule": {"freeze_masks_at": 0.7}},
    "freeze_masks_at 0.85": {"schedule": {"freeze_masks_at": 0.85}},
    "mask_lr cosine": {"schedule": {"mask_lr": "cosine"}},
    "lam_warmup 0.2": {"schedule": {"lam_warmup": 0.2}},
    "mask_lr × 2": {"scl": {"mask_lr": 2e-3}},
    "mask_lr ÷ 2": {"scl": {"mask_lr": 5e-4}},
    "mask_momentum 0": {"scl": {"mask_momentum": 0.0, "mask_lr": 1e-2}},
    "normalize layer": {"scl": {"normalize": "layer"}},
    "proxy softplus": {"scl": {"proxy": "softplus"}},
    "proxy leaky_relu": {"scl": {"proxy": "leaky_relu"}},
}
LAMBDAS = (0.2, 0.3, 0.45, 0.7, 1.0)


def mlp() -> nn.Module:
    """LeNet-300-100's shape."""
    layers = [nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


NETWORKS = {"ConvNet": SmallConvNet, "MLP": mlp}


def samples(split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8], standardised with the training split's statistics, and labels [N]."""
    source = digits()
    reader: Any = source.splits[split]
    scale: Any = source.splits["train"]
    pixels = (reader.images - scale.images.mean()) / scale.images.std()
    return torch.tensor(pixels, dtype=torch.float32)[:, None], torch.tensor(reader.labels)


def shifted(images: Tensor, generator: torch.Generator, margin: int = 1) -> Tensor:
    """Each image [N, C, H, W] moved by up to `margin` pixels, as the recipe's crop does."""
    padded = pad(images, (margin,) * 4, value=float(images.min()))
    moves = torch.randint(0, 2 * margin + 1, (len(images), 2), generator=generator)
    number, channels, height, width = images.shape
    rows = (moves[:, 0, None] + torch.arange(height))[:, None, :, None]
    columns = (moves[:, 1, None] + torch.arange(width))[:, None, None, :]
    every = torch.arange(number)[:, None, None, None]
    return padded[every, torch.arange(channels)[None, :, None, None], rows, columns]


def train(job: tuple[str, str, float, int, int]) -> tuple[float, float]:
    """(top-1, density) of one run."""
    network, setting, lam, seed, epochs = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = NETWORKS[network]()
    options = SETTINGS[setting]
    optimizer = SCL(
        connection_groups(model),
        lr=LR if network == "ConvNet" else LR / 2,
        lam=lam,
        nesterov=True,
        weight_decay=5e-4,
        **options.get("scl", {}),
    )
    scheduler = Scheduler(optimizer, Schedule(**options.get("schedule", {})))
    images, labels = samples("train")
    steps = len(labels) // BATCH
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for step in range(steps):
            scheduler.set_progress((epoch * steps + step) / (epochs * steps))
            chosen = order[step * BATCH : (step + 1) * BATCH]
            optimizer.zero_grad()
            cross_entropy(model(shifted(images[chosen], generator)), labels[chosen]).backward()
            optimizer.step()
    model.eval()
    images, labels = samples("val")
    with torch.no_grad():
        top1 = float((model(images).argmax(1) == labels).float().mean())
    masks = optimizer.masks().values()
    return top1, sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def top1_at(density: float, runs: list[tuple[float, float]]) -> float:
    """Top-1 at `density`, linear in log density between the neighbours; NaN outside of them."""
    runs = sorted(runs, key=lambda run: run[1])
    x, y = [math.log(d) for _, d in runs], [top1 for top1, _ in runs]
    if not x[0] <= math.log(density) <= x[-1]:
        return math.nan
    return float(np.interp(math.log(density), x, y))


def cell(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if any(math.isnan(value) for value in values):
        return "density outside of the λ tried"
    return f"{100 * np.mean(values):.2f} ± {100 * np.std(values):.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="two settings, one seed, few epochs")
    quick = parser.parse_args().quick
    settings = list(SETTINGS)[:2] if quick else list(SETTINGS)
    seeds, epochs = (1, 8) if quick else (2, 40)
    jobs = [
        (network, setting, lam, seed, epochs)
        for network in NETWORKS
        for setting in settings
        for lam in LAMBDAS
        for seed in range(seeds)
    ]
    with multiprocessing.get_context("spawn").Pool() as pool:
        done = list(tqdm(pool.imap(train, jobs), total=len(jobs), unit="run"))
    outcome = dict(zip(jobs, done, strict=True))
    print(f"| setting | {' | '.join(f'{n}: top-1 at {DENSITY:.0%}' for n in NETWORKS)} |")
    print("| --- |" + " --- |" * len(NETWORKS))
    table: dict[str, dict[str, list[float]]] = {}
    for setting in settings:
        cells = {}
        for network in NETWORKS:
            by_seed = [
                [outcome[network, setting, lam, seed, epochs] for lam in LAMBDAS]
                for seed in range(seeds)
            ]
            cells[network] = [top1_at(DENSITY, runs) for runs in by_seed]
        table[setting] = cells
        print(f"| {setting} | {' | '.join(cell(values) for values in cells.values())} |")
    machine = (
        f"{platform.machine()}, {multiprocessing.cpu_count()} cores, torch {torch.__version__}"
    )
    print(json.dumps({"benchmark": "defaults", "machine": machine, "top1": table}))


if __name__ == "__main__":
    main()
