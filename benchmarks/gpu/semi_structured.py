"""2:4: how much of a network converts, and how fast its layers are on sparse tensor cores."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.common import in_turn, median, median_ratio
from benchmarks.gpu.parts import Measuring
from sclcore.export.semi_structured import load_semi_structured, patterns, to_semi_structured

MODELS = ("vit_small_patch16_224", "vit_large_patch16_224", "resnet50")
BATCHES = (1, 256)
# Both round to bfloat16 and add in float32, in another order.
TOLERANCE = "≤ 2"


@torch.no_grad()
def run(measuring: Measuring) -> None:
    # Without it PyTorch's own kernels are used, which know compute capability 8 alone.
    measuring.add("cuSPARSELt", str(torch.backends.cusparselt.version()))
    for name in MODELS[:1] if measuring.is_rehearsal else MODELS:
        if not measuring.has(10):
            measuring.add("left out for lack of time, from", name)
            return
        kinds: dict[str, Any] = {"depth": 2} if measuring.is_rehearsal else {}
        # Drawn and sorted where it will be: on a CPU that takes longer than all the rest.
        with measuring.device:
            model = timm.create_model(name, num_classes=1000, **kinds).eval()
        weights = sum(p.numel() for p in model.parameters())
        lost = to_semi_structured(model)
        fit = [p for p in patterns(model) if p.qualifies]
        share = sum(_size(p.shape) for p in fit) / weights
        measuring.add(f"{name}: layers that convert", len(fit))
        measuring.add(f"{name}: their share of the weights", share)
        measuring.add(f"{name}: connections given up", sum(lost.values()) / weights)
        if measuring.device.type == "cuda" and fit:
            _speed(measuring, name, model)


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _speed(measuring: Measuring, name: str, model: nn.Module) -> None:
    device = measuring.device
    exact = copy.deepcopy(model)
    plain = copy.deepcopy(model).to(device, torch.bfloat16)
    load_semi_structured(model, torch.bfloat16)
    for batch in BATCHES:
        images = torch.randn(batch, 3, 224, 224, device=device, dtype=torch.bfloat16)
        calls = {"dense": lambda x=images: plain(x), "2:4": lambda x=images: model(x)}
        wanted = exact(images.float())
        off = {kind: float((call() - wanted).abs().max()) for kind, call in calls.items()}
        label = f"{name}, batch {batch}: error against float32"
        measuring.add(f"{label}, dense", off["dense"] / float(wanted.std()), "of std")
        measuring.add(f"{label}, 2:4 ÷ dense", off["2:4"] / off["dense"], "×", TOLERANCE)
        for call in calls.values():
            for _ in range(3):
                call()
        rounds = in_turn(calls, device, 15)
        for kind in calls:
            measuring.add(f"{name}, batch {batch}: {kind}", 1e3 * median(rounds, kind), "ms")
        faster = 1 / median_ratio(rounds, "2:4", "dense")
        measuring.add(f"{name}, batch {batch}: 2:4 is faster by", faster, "×")
