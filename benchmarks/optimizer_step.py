"""The optimizer's step alone: SCL against torch's fused step, and against the bytes it must move.

    python -m benchmarks.optimizer_step [--device cpu|cuda] [--model resnet50]
        [--weights sgd|adamw] [--quick]

The two steps are timed in turn, so that a machine whose speed drifts treats both alike; quoted are
medians and the median of the ratios. The floor is the time to move each byte once at the measured
bandwidth of a copy: per weight, SGD reads G, w and its momentum and writes two of them; SCL reads
G, w, m and two momenta and writes w, m, both momenta and v. AdamW reads and writes one number more
in both. The last line is a JSON object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.common import (
    in_turn,
    median,
    median_ratio,
    options_parser,
    parse,
    report,
    seconds,
    table,
)
from sclcore import SCL, connection_groups

SGD_BYTES, SCL_BYTES, ADAMW_MORE = 5 * 4, 10 * 4, 2 * 4
TARGET = 0.7
# With `method.target_density`, what lives is held to a share after each step.
_HELD = 0.1
_LABELS = {"scl": "SCL", "held": "SCL, a target held", "frozen": "SCL, masks frozen"}


def with_gradients(name: str, device: torch.device) -> torch.nn.Module:
    model = timm.create_model(name).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


def bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 256 MiB; the best of several."""
    source = torch.randn(64 * 2**20, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(8))
    return 2 * source.numel() * 4 / best


def steps_of(
    name: str, rule: str, device: torch.device
) -> tuple[int, dict[str, Callable[[], object]]]:
    """How many weights timm's model `name` has, and the steps to be timed, already warm."""
    # A network for each: SCL takes over what another has written into its weights, step by step.
    model, learning, limited, freezing = (with_gradients(name, device) for _ in range(4))
    common: dict[str, Any] = {"lr": 1e-4, "weight_decay": 1e-4}
    dense = AdamW(model.parameters(), fused=True, **common)
    if rule == "sgd":
        dense = SGD(model.parameters(), momentum=0.9, fused=True, **common)
    learned, frozen = connection_groups(learning), connection_groups(freezing, mask_lr=0.0)
    held = SCL(connection_groups(limited), lam=0.0, weight_rule=rule, **common)
    held.limit_share(_HELD)
    optimizers: dict[str, Optimizer] = {
        rule: dense,
        "scl": SCL(learned, lam=0.1, weight_rule=rule, **common),
        "held": held,
        "frozen": SCL(frozen, lam=0.1, weight_rule=rule, **common),
    }
    for optimizer in optimizers.values():
        for _ in range(3):
            optimizer.step()
    steps: dict[str, Callable[[], object]] = {n: o.step for n, o in optimizers.items()}
    return sum(p.numel() for p in model.parameters()), steps


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--model", default="resnet50", help="any timm model (default: resnet50)")
    parser.add_argument(
        "--weights", choices=("sgd", "adamw"), default="sgd", help="what moves them (default: sgd)"
    )
    options = parse(parser)
    device = torch.device(options.device)
    rule = options.weights
    weights, steps = steps_of(options.model, rule, device)
    rounds = in_turn(steps, device, 5 if options.quick else 25)
    times = {name: median(rounds, name) for name in steps}
    ratio = {name: median_ratio(rounds, name, rule) for name in steps}
    speed = bandwidth(device)
    more = ADAMW_MORE if rule == "adamw" else 0
    moved = {rule: SGD_BYTES + more, "scl": SCL_BYTES + more}
    floor = {name: weights * size / speed for name, size in moved.items()}
    print(f"{options.model}, {weights / 1e6:.1f} M parameters, copy at {speed / 1e9:.1f} GB/s")
    rows = [
        [
            label,
            f"{1e3 * times[name]:.2f} ms",
            f"{ratio[name]:.2f}",
            f"{1e3 * floor[name]:.2f} ms" if name in floor else "",
            f"{floor[name] / times[name]:.0%}" if name in floor else "",
        ]
        for name, label in ({rule: "torch, fused"} | _LABELS).items()
    ]
    print(table(["", "median", f"× {rule}", "byte floor", "reached"], rows))
    report(
        "optimizer_step",
        ratio=floor["scl"] / times["scl"],
        target=TARGET,
        device=device,
        details={
            **{f"{name}_over_{rule}": round(ratio[name], 3) for name in _LABELS},
            "milliseconds": {name: round(1e3 * t, 3) for name, t in times.items()},
            "copy_gb_per_s": round(speed / 1e9, 1),
        },
    )


if __name__ == "__main__":
    main()
