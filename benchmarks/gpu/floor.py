"""The optimizer's step alone against the bytes it must move."""

from __future__ import annotations

from benchmarks.common import in_turn, median, median_ratio
from benchmarks.gpu.parts import Measuring
from benchmarks.optimizer_step import ADAMW_MORE, SCL_BYTES, SGD_BYTES, bandwidth, steps_of

MODELS = ("resnet50", "vit_small_patch16_224", "mobilenetv2_100")


def run(measuring: Measuring) -> None:
    device = measuring.device
    speed = bandwidth(device)
    measuring.add("copy", speed / 1e9, "GB/s")
    for model in MODELS[2:] if measuring.is_rehearsal else MODELS:
        for rule in ("sgd", "adamw"):
            if not measuring.has(8):
                measuring.add("left out for lack of time, from", f"{model}, {rule}")
                return
            weights, steps = steps_of(model, rule, device)
            rounds = in_turn(steps, device, 2 if measuring.is_rehearsal else 25)
            more = ADAMW_MORE if rule == "adamw" else 0
            for name, size in ((rule, SGD_BYTES + more), ("scl", SCL_BYTES + more)):
                taken = median(rounds, name)
                label = f"{model}, {rule}, {'SCL' if name == 'scl' else 'torch, fused'}"
                measuring.add(f"{label}: a step", 1e3 * taken, "ms")
                target = "≥ 0.7" if name == "scl" else ""
                floor = weights * size / speed
                measuring.add(f"{label}: byte floor ÷ step", floor / taken, "", target)
            measuring.add(f"{model}: SCL ÷ {rule}", median_ratio(rounds, "scl", rule), "×")
