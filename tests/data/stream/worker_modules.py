"""What a data worker has imported: by itself when it is new, and after its first batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

OURS_AND_LARGE = {"data", "torch", "torchvision", "numpy", "PIL", "simplejpeg", "scipy", "timm"}


def imported() -> list[str]:
    """The modules of this process that are ours or cost time to import."""
    return sorted(name for name in sys.modules if name.partition(".")[0] in OURS_AND_LARGE)


def write_imported(file: Path) -> None:
    file.write_text("\n".join(imported()))


class Witness:
    """A data set that gives the modules of its process beside each batch of another one."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[Any]) -> tuple[Any, list[str]]:
        batch = self.dataset.__getitems__(keys)
        return batch, imported()
