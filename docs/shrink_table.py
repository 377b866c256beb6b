"""Latencies that `scl shrink` promises and those measured after it, with random weights.

    python docs/shrink_table.py [NETWORK:PIXELS …]

The table of docs/shrink.md. Scores are random as well: what is compared is a promise, not accuracy.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn

from launcher.models import ModelConfig, create_model
from launcher.shrink.stopwatch import Stopwatch
from sclcore.export.cutting import apply_cut
from sclcore.export.shrink.latency import LatencyModel, fit_into
from sclcore.export.shrink.units import Units

NETWORKS = ("cifar_resnet20:32", "cifar_vgg16_bn:32", "resnet18:64", "mobilenetv2_100:96")
BUDGETS = (0.8, 0.5, 0.3)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| network | pixels | points | today | budget | promised | measured | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for text in sys.argv[1:] or NETWORKS:
        name, pixels = text.split(":")
        for row in rows(name, int(pixels)):
            print(f"| {' | '.join([name, pixels, *row])} |", flush=True)


def rows(name: str, pixels: int) -> list[list[str]]:
    model = create_model(ModelConfig(name=name), num_classes=10, in_chans=3).eval()
    units = Units(model, torch.zeros(1, 3, pixels, pixels))
    images = torch.randn(1, 3, pixels, pixels)
    stopwatch = Stopwatch(copy.deepcopy(model), images)
    latency = LatencyModel(model, units, images, stopwatch)
    scores = torch.rand(units.count) + 0.1
    found = []
    for share in BUDGETS:
        promise = fit_into(latency, scores, share * stopwatch.today)
        if share * stopwatch.today < latency.measured[-1]:
            continue  # below what one feature in each layer takes
        measured = stopwatch({0: _call(model, units, promise.gone, images)})[0]
        found.append(
            [
                str(latency.table.points),
                f"{stopwatch.today:.3g} ms",
                f"{share * stopwatch.today:.3g} ms ({share:.0%})",
                f"{promise.milliseconds:.3g} ms",
                f"{measured:.3g} ms",
                f"{promise.milliseconds / measured - 1:+.1%}",
            ]
        )
    return found


def _call(model: nn.Module, units: Units, gone: Tensor, images: Tensor):
    smaller = copy.deepcopy(model).requires_grad_(False)
    apply_cut(smaller, units.cut(gone))
    return lambda: smaller(images)


if __name__ == "__main__":
    main()
