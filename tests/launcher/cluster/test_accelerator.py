"""What ranks run on, found out without starting CUDA."""

from __future__ import annotations

import pytest
import torch

from launcher.cluster.accelerator import accelerator


def test_looking_for_gpus_leaves_cuda_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def started() -> int:
        raise AssertionError("this starts CUDA, which no fork could use then")

    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    # As on a machine with two GPUs, whose library NVML says so.
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", started, raising=False)
    assert accelerator() == "cuda"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert accelerator() == "cpu"
