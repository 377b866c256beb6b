"""The Triton step against the reference: run by test_cuda.py, in Triton's interpreter or on a GPU.

In a process of its own, because TRITON_INTERPRET must be set before anything imports Triton.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from sclcore.kernels.cuda import CudaKernel
from sclcore.kernels.options import Options
from sclcore.layout.geometry import Geometry
from tests.sclcore.kernels.steps import ALL_OPTIONS, CUT, WHOLE, check_steps, label, make_pieces

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# The interpreter takes milliseconds for each program: few pieces, and long walks with few options.
SMALL = [WHOLE[0], CUT[1], CUT[3]]
LONG = [ALL_OPTIONS[i] for i in (4, 16, 23, 43)]
# In the interpreter one walk takes ten seconds: the first tier has that with most of the options,
# and of the short ones as many as have every pair of values.
FIRST_LONG, FIRST = (LONG[3:], ALL_OPTIONS[::2]) if DEVICE == "cpu" else (LONG, ALL_OPTIONS)


@pytest.fixture(scope="module")
def kernel() -> CudaKernel:
    return CudaKernel(torch.device(DEVICE))


def _in_tiers(options: list[Options], first: list[Options]) -> list[Any]:
    marks = [[] if each in first else [pytest.mark.long] for each in options]
    return [
        pytest.param(each, marks=mark, id=label(each))
        for each, mark in zip(options, marks, strict=True)
    ]


@pytest.mark.parametrize("options", _in_tiers(LONG, FIRST_LONG))
def test_agrees_over_many_steps(kernel: CudaKernel, options: Options) -> None:
    flips, _ = check_steps(kernel, options, SMALL, steps=50, device=DEVICE)
    assert flips >= 20 if options.mask_lr else flips == 0


@pytest.mark.parametrize("options", _in_tiers(ALL_OPTIONS, FIRST))
def test_agrees_with_all_options(kernel: CudaKernel, options: Options) -> None:
    check_steps(kernel, options, SMALL, steps=2, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_agrees_on_pieces_of_every_kind(kernel: CudaKernel, dtype: torch.dtype) -> None:
    options = next(o for o in ALL_OPTIONS if o.nesterov and o.mask_lr and o.weight_decay)
    check_steps(kernel, options, [*WHOLE, *CUT], steps=2, dtype=dtype, device=DEVICE)


def test_tables_follow_the_pieces(kernel: CudaKernel) -> None:
    conv = (Geometry("conv", (4, 3, 2, 2)), 0, None)
    first, second = make_pieces([conv] * 2, momentum=True, device=DEVICE)
    known = kernel._describe([first, second])
    assert kernel._describe([first, second]) is known
    assert kernel._describe([first]) is not known
    del first, second, known
    assert not kernel._tables
