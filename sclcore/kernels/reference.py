"""The update of SCL on pieces of tensors, in plain PyTorch: every other implementation's reference.

Two passes, because normalisation needs whole features: `sums` adds up squares of the mask gradient,
the caller completes them where other ranks hold a part of a feature, and `update` does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from sclcore.choice import best_of_blocks
from sclcore.kernels.options import Options
from sclcore.kernels.proxies import get_proxy, unit_step
from sclcore.layout.piece import Piece
from sclcore.optim.rules import step_adamw

LIVE, FLIPS, REVIVALS = range(3)
"""What `update` counts for each piece: live connections, masks that changed, and those of them that
came to life."""
COUNTS = 3


@dataclass(frozen=True)
class Cuts:
    """What other ranks know of units and N:M blocks that reach beyond a piece, by their number.

    `units` holds the gradient of the unit's mask variable; `blocks` the mask variables of the block
    [M] as they are when the step begins.
    """

    units: Mapping[int, Tensor] = field(default_factory=dict)
    blocks: Mapping[int, Tensor] = field(default_factory=dict)


NO_CUTS = Cuts()


def live(piece: Piece, blocks: Mapping[int, Tensor] = NO_CUTS.blocks) -> Tensor:
    """H(m) of a piece [length]: true where the connection is live.

    `blocks` holds the mask variables of the N:M blocks that the piece has only parts of.
    """
    on = unit_step(piece.mask)
    return on if piece.tensor.n_m is None else on & chosen(piece, blocks)


def chosen(piece: Piece, blocks: Mapping[int, Tensor] = NO_CUTS.blocks) -> Tensor:
    """Where a connection is among the best N of its N:M block [length], whether above 0 or not."""
    assert piece.tensor.n_m is not None
    n, m = piece.tensor.n_m
    rows, first = piece.stretches(piece.mask, m), piece.start // m
    if blocks:
        rows = rows.clone()
    for number, values in blocks.items():
        rows[number - first] = values
    head = piece.start % m
    return best_of_blocks(rows, n).view(-1)[head : head + piece.length]


def raw_gradient(piece: Piece, grad: Tensor, options: Options) -> Tensor:
    """G ⊙ w ⊙ φ'(m), a new tensor [length]; under `root`, G ⊙ sign(w) √|w| ⊙ φ'(m).

    Always G ⊙ w where several weights share a mask variable: a factor for each weight would turn
    the sum of a unit away from the direction in which its loss falls.
    """
    if options.mask_gradient == "root" and piece.tensor.unit == 1:
        gradient = piece.weight.abs().sqrt_().copysign_(piece.weight).mul_(grad)
    else:
        gradient = grad * piece.weight
    derivative = get_proxy(options.proxy).derivative
    if derivative is not None:
        gradient.mul_(derivative(piece.mask.to(gradient.dtype)))
    return gradient


def unit_sums(piece: Piece, raw: Tensor) -> Tensor:
    """What this piece adds to the gradient of each mask variable [units that it touches]."""
    unit = piece.tensor.unit
    return raw if unit == 1 else piece.stretches(raw, unit).sum(1)


def squares(piece: Piece, gradient: Tensor, skip: Mapping[int, Tensor]) -> Tensor:
    """Σ (∂L/∂m)² per feature [features] over the mask variables of this piece but those in `skip`.

    `gradient` has one number per unit.
    """
    unit, run = piece.tensor.unit, piece.tensor.run
    if unit == 1:
        return piece.by_feature(piece.stretches(gradient, run).square().sum(1))
    per_run, first = run // unit, piece.start // unit
    squared = gradient.square()
    for number in skip:
        squared[number - first] = 0.0
    head, tail = first % per_run, -(first + len(squared)) % per_run
    return piece.by_feature(pad(squared, (head, tail)).view(-1, per_run).sum(1))


def sums(piece: Piece, grad: Tensor, options: Options, cuts: Cuts = NO_CUTS) -> Tensor:
    """The first pass: Σ (∂L/∂m)² per feature [features], without the units in `cuts`."""
    return squares(piece, unit_sums(piece, raw_gradient(piece, grad, options)), cuts.units)


def mask_gradient(
    piece: Piece, grad: Tensor, options: Options, units: Mapping[int, Tensor]
) -> Tensor:
    """∂L/∂m for each element [length]; those of one unit all have its gradient."""
    raw = raw_gradient(piece, grad, options)
    unit = piece.tensor.unit
    if unit == 1:
        return raw
    per_unit, first = unit_sums(piece, raw), piece.start // unit
    for number, total in units.items():
        per_unit[number - first] = total
    return piece.spread(per_unit, unit)


def update(
    piece: Piece, grad: Tensor, options: Options, divisor: Tensor | None, cuts: Cuts = NO_CUTS
) -> Tensor:
    """The second pass: w, m, their momenta and v = w ⊙ H(m); returns the three counts [3], int64.

    `divisor` [features] is what mask gradients are divided by (None: 1). Not for pieces that cut
    N:M blocks: those need their neighbours' new mask variables between `advance` and `finish`.
    """
    before = advance(piece, grad, options, divisor, cuts)
    return finish(piece, before)


def advance(
    piece: Piece, grad: Tensor, options: Options, divisor: Tensor | None, cuts: Cuts = NO_CUTS
) -> Tensor:
    """Move w, m and their momenta; returns H(m) as it was [length]."""
    before = live(piece, cuts.blocks)
    # Both gradients are taken at the present w and m, before either of them moves.
    gradient = mask_gradient(piece, grad, options, cuts.units) if options.mask_lr else None
    step_weight(piece, grad, before, options)
    if gradient is not None:
        step_mask(piece, gradient, options, divisor)
    return before


def finish(piece: Piece, before: Tensor, blocks: Mapping[int, Tensor] = NO_CUTS.blocks) -> Tensor:
    """Write v = w ⊙ H(m) and count [3]; `blocks` holds cut N:M blocks as they are now."""
    after = live(piece, blocks)
    write(piece, after)
    parts = [after, after != before, after & ~before]
    return torch.stack([torch.count_nonzero(part) for part in parts])


def step_weight(piece: Piece, grad: Tensor, before: Tensor, options: Options) -> None:
    """Move w by ∂L/∂w = G ⊙ H(m) and the decay of the latent weight; `before` is H(m) [length]."""
    step = torch.where(before, grad, 0.0)
    rule = options.adamw
    if rule is not None:
        assert piece.exp_avg is not None and piece.exp_avg_sq is not None
        state = ([piece.exp_avg], [piece.exp_avg_sq])
        step_adamw([piece.weight], [step], *state, rule, options.lr, options.weight_decay)
        return
    if options.weight_decay:
        step.add_(piece.weight, alpha=options.weight_decay)
    if piece.momentum is not None:
        piece.momentum.mul_(options.momentum).add_(step)
        step = (
            step.add_(piece.momentum, alpha=options.momentum)
            if options.nesterov
            else piece.momentum
        )
    piece.weight.add_(step, alpha=-options.lr)


def step_mask(piece: Piece, gradient: Tensor, options: Options, divisor: Tensor | None) -> None:
    """m ← m − lr_m · momentum(ĝ + λ · c · φ'(m)), and anew where it rose above 0.

    Overwrites `gradient`.
    """
    mask, dead = piece.mask.to(gradient.dtype), piece.mask <= 0
    if divisor is not None:
        rows = _rows(piece, gradient)
        if rows is not None:
            rows.div_(piece.by_run(divisor)[:, None])
        else:
            gradient.div_(piece.spread(piece.by_run(divisor), piece.tensor.run))
    derivative = get_proxy(options.proxy).derivative
    if derivative is None:
        gradient.add_(options.price)
    else:
        gradient.add_(derivative(mask), alpha=options.price)
    if piece.mask.dtype == gradient.dtype:
        piece.mask_momentum.mul_(options.mask_momentum).add_(gradient)
        piece.mask.add_(piece.mask_momentum, alpha=-options.mask_lr)
    else:
        momentum = piece.mask_momentum.to(gradient.dtype).mul_(options.mask_momentum).add_(gradient)
        mask = mask.add_(momentum, alpha=-options.mask_lr)
        piece.mask_momentum.copy_(round_at_random(momentum, piece, options.noise ^ 0x5BD1E995))
        piece.mask.copy_(round_at_random(mask, piece, options.noise))
    if options.mask_restart:
        revived = dead.logical_and_(piece.mask > 0)
        piece.mask.masked_fill_(revived, options.mask_restart)
        piece.mask_momentum.masked_fill_(revived, 0.0)


def low(piece: Piece, bound: float) -> tuple[Tensor, Tensor]:
    """(the bits of mask variables in (0, bound], how many lie above), of a plain piece."""
    chosen = piece.mask[(piece.mask > 0) & (piece.mask <= bound)]
    return chosen.view(torch.int32), torch.count_nonzero(piece.mask > bound)


def lower(piece: Piece, before: Tensor, distance: float, options: Options) -> Tensor:
    """m − `distance`, anew where it has come to life since `before` [length]; v; the counts [3]."""
    if distance and piece.mask.dtype == torch.bfloat16:
        lowered = round_at_random(piece.mask.float() - distance, piece, options.noise ^ 0x2C1B3C6D)
        piece.mask.copy_(lowered)
    elif distance:
        piece.mask.sub_(distance)
    after = live(piece)
    revived = after & ~before
    if options.mask_restart:
        piece.mask.masked_fill_(revived, options.mask_restart)
        piece.mask_momentum.masked_fill_(revived, 0.0)
    write(piece, after)
    parts = (after, after != before, revived)
    return torch.stack([torch.count_nonzero(part) for part in parts])


def write(piece: Piece, on: Tensor) -> None:
    """v = w ⊙ H(m), into the parameter."""
    piece.param.copy_(torch.where(on, piece.weight, 0.0))
    if piece.target is not None:
        piece.target.copy_(piece.param.view(piece.target.shape))


def round_at_random(values: Tensor, piece: Piece, noise: int) -> Tensor:
    """float32 → bfloat16, up or down with the probability that makes the mean exact.

    Steps of a mask variable are far smaller than what bfloat16 tells apart near 1: rounded to the
    nearest, it would never move. The draw is a hash of `noise` and the element's position, the same
    on every rank and however the tensor is cut.
    """
    end = piece.start + piece.length
    position = torch.arange(piece.start, end, dtype=torch.int32, device=values.device)
    if piece.tensor.unit > 1:  # a unit is one mask variable, so one draw
        position.floor_divide_(piece.tensor.unit)
    # Multiply and fold, twice (the finaliser of MurmurHash3, in wrapping 32-bit integers).
    bits = position.mul_(-1640531527).add_(_int32(noise))
    bits.bitwise_xor_(bits.bitwise_right_shift(15).bitwise_and_(0x1FFFF)).mul_(-2048144789)
    bits.bitwise_xor_(bits.bitwise_right_shift(13).bitwise_and_(0x7FFFF)).mul_(-1028477387)
    low = bits.bitwise_right_shift(16).bitwise_and_(0xFFFF)
    return values.float().view(torch.int32).add(low).bitwise_and_(-65536).view(torch.float32)


def _int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _rows(piece: Piece, gradient: Tensor) -> Tensor | None:
    run = piece.tensor.run
    if piece.start % run or piece.length % run:
        return None
    return gradient.view(-1, run)
