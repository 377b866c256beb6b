"""What is measured on a GPU, the most worthwhile first, and how a part tells what it found."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """`run(measuring)` of the module `benchmarks.gpu.<module>`, in its share of the time."""

    name: str
    about: str
    module: str
    weight: float
    """Of the time that is left, its share beside the weights of those that follow."""
    needs: tuple[str, ...] = ()
    """Packages beyond torch, triton, timm, torchvision, pydantic, tqdm and what these bring."""
    least_s: float = 5
    """Below this it is not begun."""

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


_LAUNCHER = ("deepspeed", "psutil", "simplejpeg")
_DIGITS = ("webdataset", "sklearn")

PARTS = (
    Part("kernels", "fused steps against the reference in float64", "kernels", 1.5),
    Part("floor", "optimizer step ÷ the time to move its bytes", "floor", 1),
    Part("training", "SCL ÷ dense ÷ timm's own loop: time and memory of a step", "training", 5),
    Part("semi_structured", "2:4: what conversion keeps, and its speed", "semi_structured", 1),
    Part(
        "telemetry",
        "watching masks: step with ÷ without",
        "command",
        1.5,
        (*_LAUNCHER, *_DIGITS, "wandb"),
    ),
    Part(
        "feeding",
        "the loader and a step that takes from it",
        "feeding",
        1.5,
        ("psutil", "simplejpeg"),
    ),
    Part("checkpoint", "a step beside a checkpoint being written ÷ alone", "command", 1, _LAUNCHER),
    Part(
        "demo",
        "the digits, trained by `scl train`",
        "demo",
        2,
        (*_LAUNCHER, *_DIGITS, "wandb", "rich", "rich_argparse", "matplotlib"),
        least_s=20,
    ),
)


class Measuring:
    """The place of a part: its device, the time it has, and where its numbers go."""

    def __init__(self, name: str, device: torch.device, seconds: float, rows: Path) -> None:
        self.name = name
        self.device = device
        self._end = time.monotonic() + seconds
        self._rows = rows

    @property
    def is_rehearsal(self) -> bool:
        """Whether only that it runs is of interest."""
        return self.device.type == "cpu"

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def has(self, share: float) -> bool:
        """Whether so many seconds are left; on the CPU everything goes once."""
        return self.left_s > share

    def add(self, what: str, value: float | str, unit: str = "", target: str = "") -> None:
        """Note a number; it stays whatever happens to the part."""
        row: dict[str, Any] = {"what": what, "value": value, "unit": unit, "target": target}
        with self._rows.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
