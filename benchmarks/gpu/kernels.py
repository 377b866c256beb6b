"""The fused step against the reference, both against the reference in float64."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu.parts import Measuring
from sclcore.kernels import reference
from sclcore.kernels.find import find_kernel
from sclcore.kernels.options import Options
from sclcore.kernels.proxies import PROXIES
from sclcore.layout.geometry import Geometry
from sclcore.layout.piece import Piece

# Layers of ResNet-50 and ViT-S, a depthwise one, and what a rank may hold of one under ZeRO.
SHAPES = {
    "conv 256×256×3×3": ((256, 256, 3, 3), None),
    "linear 1536×384": ((1536, 384), None),
    "depthwise 384×1×3×3": ((384, 1, 3, 3), None),
    "classifier 1000×2048": ((1000, 2048), None),
    "a cut through features": ((512, 777), (1003, 200_001)),
}
STEPS = 20
# Momentum of the weights, and whether in Nesterov's form. AdamW moves them outside of the kernel.
RULES = {"nesterov": (0.9, True), "momentum": (0.9, False), "plain": (0.0, False)}
_STATE = ("weight", "mask", "momentum", "mask_momentum")


def run(measuring: Measuring) -> None:
    kernel = find_kernel(measuring.device)
    if kernel is None:
        measuring.add("fused step", "none on this device")
        return
    shapes = dict(list(SHAPES.items())[2:3]) if measuring.is_rehearsal else SHAPES
    worst = 0.0
    # What is the default comes first, and of that all shapes.
    cases = [*product(PROXIES, RULES, shapes.items())]
    for number, (proxy, rule, (name, (shape, cut))) in enumerate(cases):
        # Another proxy or rule is compiled anew, which takes seconds.
        if not measuring.has(1 if measuring.is_rehearsal else 5):
            left = f"{len(cases) - number} of {len(cases)}, from {name}, {rule}, {proxy}"
            measuring.add("cases left out for lack of time", left)
            break
        error, flips = _errors(measuring.device, kernel, shape, cut, RULES[rule], proxy)
        ratio = error["fused"] / max(error["reference"], 1e-12)
        worst = max(worst, ratio)
        measuring.add(f"{name}, {rule}, {proxy}: error of the fused step", error["fused"], "of rms")
        measuring.add(f"{name}, {rule}, {proxy}: ÷ that of the reference", ratio, "", "≤ 4")
        if flips:
            measuring.add(f"{name}, {rule}, {proxy}: masks otherwise than in float64", flips)
    measuring.add("worst ratio of errors, fused ÷ reference in float32", worst, "", "≤ 4")


def _errors(
    device: torch.device,
    kernel,
    shape: tuple[int, ...],
    cut: tuple[int, int] | None,
    rule: tuple[float, bool],
    proxy: str,
) -> tuple[dict[str, float], int]:
    """Largest error of any state, over its rms, of both in float32; masks that fell otherwise.

    Positions whose mask differs are counted instead: from there on the weights part ways.
    """
    options = Options(
        lr=0.01,
        momentum=rule[0],
        nesterov=rule[1],
        weight_decay=1e-3,
        mask_lr=0.02,
        mask_momentum=0.8,
        mask_restart=0.1 if rule[1] else 0.0,
        mask_gradient="root" if rule[1] else "full",
        proxy=proxy,
        price=0.05,
        noise=0,
    )
    has_momentum = rule[0] > 0
    exact = _piece(shape, cut, has_momentum, device, torch.float64)
    fused, plain = (_piece(shape, cut, has_momentum, device, torch.float32) for _ in range(2))
    generator = torch.Generator(device).manual_seed(1)
    alike = torch.ones(exact.length, dtype=torch.bool, device=device)
    for _ in range(STEPS):
        grad = 0.01 * torch.randn(exact.length, generator=generator, device=device)
        _plain_step(exact, grad.double(), options)
        _plain_step(plain, grad, options)
        sums = kernel.sums([fused], [grad], [options])
        kernel.update([fused], [grad], [options], _divisor(fused, sums))
        for other in (fused, plain):
            alike &= (other.mask > 0) == (exact.mask > 0)
    return {
        name: max(_error(getattr(piece, key), getattr(exact, key), alike) for key in _STATE)
        for name, piece in (("fused", fused), ("reference", plain))
    }, int((~alike).sum())


def _plain_step(piece: Piece, grad: Tensor, options: Options) -> None:
    sums = reference.sums(piece, grad, options)
    reference.update(piece, grad, options, _divisor(piece, sums))


def _divisor(piece: Piece, sums: Tensor) -> Tensor:
    return (sums / piece.tensor.run).sqrt() + 1e-12


def _error(value: Tensor | None, exact: Tensor | None, alike: Tensor) -> float:
    if value is None or exact is None:
        return 0.0
    off = (value.double() - exact)[alike].abs().max()
    return float(off / exact.square().mean().sqrt().clamp(min=1e-30))


def _piece(
    shape: tuple[int, ...],
    cut: tuple[int, int] | None,
    has_momentum: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Piece:
    tensor = Geometry("layer", shape)
    start, length = cut or (0, tensor.numel)
    generator = torch.Generator(device).manual_seed(0)

    def values(scale: float) -> Tensor:
        # Drawn in float32 for all, so that all begin alike.
        return (scale * torch.randn(length, generator=generator, device=device)).to(dtype)

    return Piece(
        tensor,
        0,
        start,
        param=values(0.0),
        weight=values(1.0),
        mask=values(0.2),
        mask_momentum=values(0.0),
        momentum=values(0.0) if has_momentum else None,
    )
