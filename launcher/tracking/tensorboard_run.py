"""TensorBoard as a second tracker: the same series, in event files of the run's folder."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher.errors import UsageError
from launcher.recipe.tracking import TrackingConfig
from launcher.tracking.values import Histogram

_log = logging.getLogger("scl.tracking")


def check_tensorboard(config: TrackingConfig) -> None:
    """Raises UsageError where `config` asks for TensorBoard and its package is not there."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "tracking.tensorboard needs a package that is not here: pip install tensorboard "
            "(or 'scl-train[tensorboard]'), or set it to false"
        )


class TensorBoardRun:
    """Event files in `run_dir/tensorboard`; a failure is one warning, and ends them alone.

    What an earlier start recorded beyond `resume_step` is not shown.
    """

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        self._writer: Any = None

        def begin() -> None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None
            )

        self._guard("begin", begin)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers and histograms; what is neither is left out."""

        def write() -> None:
            for name, value in values.items():
                if isinstance(value, Histogram):
                    self._writer.add_histogram_raw(name, global_step=step, **_raw(value))
                elif isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

        self._guard("log", write)

    def images(self, images: Sequence[Path], step: int) -> None:
        """Pictures of the whole run, PNG files."""

        def write() -> None:
            from PIL import Image

            for path in images:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                self._writer.add_image(f"charts/{path.stem}", pixels, step, dataformats="HWC")

        self._guard("draw", write)

    def close(self) -> None:
        self._guard("finish", lambda: self._writer.close())
        self._writer = None

    def _guard(self, what: str, call: Callable[[], None]) -> None:
        if self._writer is None and what != "begin":
            return
        try:
            call()
        except Exception as error:
            reason = " ".join(str(error).split())
            _log.warning("TensorBoard cannot %s (%s); going on without it", what, reason)
            self._writer = None


def _raw(histogram: Histogram) -> dict[str, Any]:
    """Its bins as TensorBoard has them, with sums as if all of a bin lay at its middle."""
    counts, edges = np.array(histogram.counts, float), np.array(histogram.edges, float)
    middles = (edges[1:] + edges[:-1]) / 2
    return {
        "min": edges[0],
        "max": edges[-1],
        "num": counts.sum(),
        "sum": counts @ middles,
        "sum_squares": counts @ middles**2,
        # The right end of each bin.
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }
