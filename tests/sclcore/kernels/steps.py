"""Steps of a fused implementation beside those of the reference, on pieces of every kind."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from sclcore.kernels import reference as reference
from sclcore.kernels.kernel import Kernel
from sclcore.kernels.options import Options
from sclcore.kernels.proxies import PROXIES
from sclcore.kernels.reference import FLIPS, REVIVALS
from sclcore.layout.geometry import Geometry
from sclcore.layout.piece import Piece

# What the sums of squares may differ by, relatively: both add up to thousands of float32 in some
# order, some 1e-7 each time they round, and partly cancelling.
SUMS = 2e-6
# Half of that is in the divisor, so in ĝ, whose steps are some 0.1 here (mask_lr / (1 - momentum)
# times a few): 50 of them. Any wrong term shows as 1e-3 and more.
MASKS = 2e-5
# w never sees a divisor, only H(m), and the counts tell that it is the same: what is left is one
# rounding where a CPU has no fused multiply-add, in values of about 1.
WEIGHTS = 1e-6

ALL_OPTIONS = [
    Options(
        lr=0.1,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        mask_lr=mask_lr,
        mask_momentum=0.8,
        mask_restart=0.5 if nesterov else 0.0,
        mask_gradient="root" if nesterov else "full",
        proxy=proxy,
        price=0.05,
        noise=0,
    )
    for proxy in PROXIES
    for momentum, nesterov in ((0.0, False), (0.9, False), (0.9, True))
    for weight_decay, mask_lr in ((0.0, 0.02), (1e-3, 0.02), (1e-3, 0.0))
]


def label(options: Options) -> str:
    momentum = "nesterov" if options.nesterov else "momentum" if options.momentum else "plain"
    frozen = "" if options.mask_lr else "-frozen"
    return f"{options.proxy}-{momentum}-{options.weight_decay}{frozen}"


WHOLE = [
    (Geometry("conv", (8, 3, 3, 3)), 0, None),
    (Geometry("depthwise", (300, 1, 3, 3)), 0, None),
    (Geometry("pointwise", (24, 16, 1, 1)), 0, None),
    (Geometry("middling", (6, 200)), 0, None),
    (Geometry("long", (2, 5000)), 0, None),
    (Geometry("transposed", (6, 5, 2, 2), 2), 0, None),
    (Geometry("vector", (9,)), 0, None),
]
CUT = [
    (Geometry("ends inside of features", (50, 77)), 30, 3001),
    (Geometry("within one feature", (7, 100)), 130, 40),
    (Geometry("from its start", (7, 100)), 200, 150),
    (Geometry("transposed, cut", (6, 5, 3, 3), 3), 40, 150),
]


def make_pieces(
    parts: Sequence[tuple[Geometry, int, int | None]],
    *,
    momentum: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Piece]:
    """Pieces of (tensor, start, length; None: all of it), masks on both sides of 0 and on it."""
    generator = torch.Generator().manual_seed(0)

    def values(length: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
        # Slices of a flat tensor, as under ZeRO, begin wherever the tensor before them ends.
        whole = scale * torch.randn(length + 1, generator=generator)
        return whole.to(device, dtype)[length % 2 :][:length]

    pieces = []
    for index, (tensor, start, held) in enumerate(parts):
        length = tensor.numel if held is None else held
        pieces.append(
            Piece(
                tensor,
                index,
                start,
                param=values(length, 0.0, dtype),
                weight=values(length, 1.0),
                mask=values(length, 0.2),
                momentum=values(length, 0.0) if momentum else None,
                mask_momentum=values(length, 0.0),
            )
        )
        # Where proxies have their corners; 1 is where masks customarily start.
        pieces[-1].mask[::5], pieces[-1].mask[1::5] = 0.0, 1.0
    return pieces


def check_steps(
    kernel: Kernel,
    options: Options,
    parts: Sequence[tuple[Geometry, int, int | None]],
    *,
    steps: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[int, int]:
    """Assert that both implementations agree step after step; returns (flips, revivals)."""
    pieces = make_pieces(parts, momentum=options.momentum > 0, dtype=dtype, device=device)
    others = copy.deepcopy(pieces)
    # Each piece has its price.
    settings = [
        dataclasses.replace(options, price=options.price * i) for i in range(1, len(pieces) + 1)
    ]
    runs = torch.cat([torch.full((p.features,), float(p.tensor.run)) for p in pieces]).to(device)
    generator = torch.Generator().manual_seed(1)
    flips = revivals = 0
    for _ in range(steps):
        grads = [
            (0.01 * torch.randn(piece.length, generator=generator)).to(device) for piece in pieces
        ]
        divisors = expected = torch.ones_like(runs)
        if options.mask_lr:
            sums = kernel.sums(pieces, grads, settings)
            theirs = [reference.sums(*each) for each in zip(others, grads, settings, strict=True)]
            # Relative alone: a sum of squares that is right to 2e-6 is so however small it is.
            torch.testing.assert_close(sums, torch.cat(theirs), rtol=SUMS, atol=0.0)
            divisors = (sums / runs).sqrt() + 1e-12
            expected = (torch.cat(theirs) / runs).sqrt() + 1e-12
        counts = kernel.update(pieces, grads, settings, divisors)
        parts_of = expected.split([piece.features for piece in others])
        counted = [
            reference.update(*each) for each in zip(others, grads, settings, parts_of, strict=True)
        ]
        assert torch.equal(counts, torch.stack(counted))
        flips += int(counts[:, FLIPS].sum())
        revivals += int(counts[:, REVIVALS].sum())
    _assert_alike(pieces, others)
    return flips, revivals


def _assert_alike(pieces: Sequence[Piece], others: Sequence[Piece]) -> None:
    for mine, theirs in zip(pieces, others, strict=True):
        for name in ("weight", "momentum", "param"):
            a, b = getattr(mine, name), getattr(theirs, name)
            if a is not None:
                # A parameter in half precision may round to the other neighbour.
                step = torch.finfo(a.dtype).eps if a.dtype != torch.float32 else 0.0
                torch.testing.assert_close(a, b, rtol=step, atol=WEIGHTS, msg=mine.tensor.name)
        torch.testing.assert_close(mine.mask, theirs.mask, rtol=0.0, atol=MASKS)
        torch.testing.assert_close(mine.mask_momentum, theirs.mask_momentum, rtol=0.0, atol=1e-4)
