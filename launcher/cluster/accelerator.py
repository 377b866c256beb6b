"""What ranks run on."""

from __future__ import annotations

import os
from typing import Literal


def accelerator() -> Literal["cuda", "cpu"]:
    """What ranks run on: GPUs where there are any, unless DS_ACCELERATOR=cpu says otherwise."""
    import torch

    # Asked of NVML: asking the driver would start CUDA here, and in no fork of this process, as the
    # ranks of `scl train` are, could it be started then.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    asked = os.environ.get("DS_ACCELERATOR")
    return "cuda" if torch.cuda.is_available() and asked in (None, "cuda") else "cpu"
