"""The two passes on a GPU: one launch each for any number of pieces, which tables describe.

Rounded like PyTorch's own kernels: `tl.fma` where those fuse, one rounding per operation elsewhere,
for which they must be launched with `enable_fp_fusion=False`. No float is added atomically, so that
the same step gives the same bits each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024
"""Elements that a program of `update` moves, and that one of `sums` reads at a time."""

WIDTHS = (16, 128, 1024)
"""Elements of one run that `sums` reads at a time, for short, middling and long runs."""

# The columns of the table of pieces: five addresses, then numbers.
(
    _PARAM, _WEIGHT, _MASK, _MOMENTUM, _MASK_MOMENTUM,
    _LENGTH, _RUN, _HEAD, _FIRST_RUN, _SPAN, _FEATURES, _SUMS, _DIVISORS, _PRECISION, _WIDTH,
) = (tl.constexpr(column) for column in range(15))  # fmt: skip
_COLUMNS = tl.constexpr(15)
_BLOCK = tl.constexpr(BLOCK)
_SHORT, _MIDDLE, _LONG = (tl.constexpr(width) for width in WIDTHS)
_YES, _NO = tl.constexpr(True), tl.constexpr(False)
_BF16, _FP16 = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _get(pieces, piece, COLUMN: tl.constexpr):
    return tl.load(pieces + piece * _COLUMNS + COLUMN)


@triton.jit
def _floats(address):
    return address.to(tl.pointer_type(tl.float32))


@triton.jit
def _wide(address, dtype, ALIGNED: tl.constexpr):
    """A pointer; what is known of its alignment makes wide loads and stores of narrow ones."""
    pointer = address.to(tl.pointer_type(dtype))
    # The compiler keeps the hint on what was made in this very function, not on arguments.
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _slope(m, PROXY: tl.constexpr, LEAKY_SLOPE: tl.constexpr):
    if PROXY == "leaky_relu":
        phi = tl.where(m > 0, 1.0, LEAKY_SLOPE)
    elif PROXY == "softplus":
        phi = tl.sigmoid(m)
    elif PROXY == "relu":
        phi = tl.where(m > 0, 1.0, 0.0)
    else:
        tl.static_assert(PROXY == "clipped")
        phi = tl.where((m > 0) & (m <= 1), 1.0, 0.0)
    return phi


@triton.jit
def _factor(w, ROOT: tl.constexpr):
    """What G is multiplied by: w, or sign(w) √|w|."""
    if ROOT:
        root = tl.sqrt_rn(tl.abs(w))
        w = tl.where(w < 0, -root, root)
    return w


@triton.jit
def _sum_runs(
    pieces, piece, tile, gradients, out,
    PROXY: tl.constexpr, LEAKY_SLOPE: tl.constexpr, ROOT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Σ (∂L/∂m)² of each run of a tile, `WIDTH` elements of each at a time."""
    RUNS: tl.constexpr = _BLOCK // WIDTH
    run, head = _get(pieces, piece, _RUN), _get(pieces, piece, _HEAD)
    length = _get(pieces, piece, _LENGTH)
    grad = _floats(tl.load(gradients + piece))
    weight = _floats(_get(pieces, piece, _WEIGHT))
    mask = _floats(_get(pieces, piece, _MASK))
    number = tile * RUNS + tl.arange(0, RUNS)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((RUNS, WIDTH), tl.float32)
    for start in range(0, run, WIDTH):
        within = start + column
        at = (number * run - head)[:, None] + within[None, :]
        held = (within < run)[None, :] & (at >= 0) & (at < length)
        u = _factor(tl.load(weight + at, held, 0.0), ROOT)
        x = tl.load(grad + at, held, 0.0) * u
        if PROXY != "identity":
            x *= _slope(tl.load(mask + at, held, 0.0), PROXY, LEAKY_SLOPE)
        total += x * x
    runs = (length + head + run - 1) // run
    offset = _get(pieces, piece, _SUMS)
    tl.store(out + offset + number, tl.sum(total, 1), number < runs)


@triton.jit
def sums(
    tiles, pieces, gradients, out,
    PROXY: tl.constexpr, LEAKY_SLOPE: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """Σ (∂L/∂m)² of each run of each piece → `out`.

    `tiles` holds the piece of each program and the number of its tile there.
    """
    program = tl.program_id(0)
    piece, tile = tl.load(tiles + 2 * program), tl.load(tiles + 2 * program + 1)
    width = _get(pieces, piece, _WIDTH)
    if width == _SHORT:
        _sum_runs(pieces, piece, tile, gradients, out, PROXY, LEAKY_SLOPE, ROOT, _SHORT)
    elif width == _MIDDLE:
        _sum_runs(pieces, piece, tile, gradients, out, PROXY, LEAKY_SLOPE, ROOT, _MIDDLE)
    else:
        _sum_runs(pieces, piece, tile, gradients, out, PROXY, LEAKY_SLOPE, ROOT, _LONG)


@triton.jit
def _divisor(pieces, piece, offset, divisors, held):
    """What the mask gradient of each element of a chunk is divided by."""
    run, position = _get(pieces, piece, _RUN), _get(pieces, piece, _HEAD) + offset
    # 32 bits from here on: no tensor has that many elements in a run, nor that many runs.
    within = (position % run).to(tl.int32) + tl.arange(0, _BLOCK)
    number = (position // run + _get(pieces, piece, _FIRST_RUN)).to(tl.int32)
    feature = number + within // run.to(tl.int32)
    span = _get(pieces, piece, _SPAN).to(tl.int32)
    if span > 1:
        features = _get(pieces, piece, _FEATURES).to(tl.int32)
        feature = feature // span * features + feature % features
    return tl.load(divisors + _get(pieces, piece, _DIVISORS) + feature, held, 1.0)


@triton.jit
def _write(pieces, piece, at, v, held, ALIGNED: tl.constexpr):
    """v into the parameter, in its precision."""
    param, precision = _get(pieces, piece, _PARAM), _get(pieces, piece, _PRECISION)
    if precision == _BF16:
        pointer = _wide(param, tl.bfloat16, ALIGNED)
        tl.store(pointer + at, v.to(tl.bfloat16), held)
    elif precision == _FP16:
        pointer = _wide(param, tl.float16, ALIGNED)
        tl.store(pointer + at, v.to(tl.float16), held)
    else:
        tl.store(_wide(param, tl.float32, ALIGNED) + at, v, held)


@triton.jit
def _count(counts, before, after, held):
    tl.atomic_add(counts, tl.sum((after & held).to(tl.int64)), sem="relaxed")
    tl.atomic_add(counts + 1, tl.sum(((after != before) & held).to(tl.int64)), sem="relaxed")
    tl.atomic_add(counts + 2, tl.sum((after & (before == 0) & held).to(tl.int64)), sem="relaxed")


@triton.jit
def _move(
    pieces, piece, chunk, grad, prices, divisors, counts,
    lr, momentum, weight_decay, mask_lr, mask_momentum, mask_restart,
    PROXY: tl.constexpr, LEAKY_SLOPE: tl.constexpr, ROOT: tl.constexpr, NESTEROV: tl.constexpr,
    LEARNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    length = _get(pieces, piece, _LENGTH)
    if ALIGNED:
        # By arithmetic: Triton 3.8 forgets `tl.multiple_of` of a loaded number, and with it that
        # four neighbours are held or not together, which wide loads and stores depend on.
        length = length // 4 * 4
    offset = chunk * _BLOCK
    at = offset + tl.arange(0, _BLOCK)
    held = at < length
    weights = _wide(_get(pieces, piece, _WEIGHT), tl.float32, ALIGNED) + at
    masks = _wide(_get(pieces, piece, _MASK), tl.float32, ALIGNED) + at
    g = tl.load(_wide(grad, tl.float32, ALIGNED) + at, held, 0.0)
    w, m = tl.load(weights, held, 0.0), tl.load(masks, held, 0.0)
    before, moved, zero = m > 0, m, tl.zeros_like(w)
    if LEARNS:
        price = tl.load(prices + piece)
        divisor = _divisor(pieces, piece, offset, divisors, held)
        u = _factor(w, ROOT)
        if PROXY == "identity":
            x = tl.div_rn(g * u, divisor) + price
        else:
            phi = _slope(m, PROXY, LEAKY_SLOPE)
            x = tl.fma(phi, zero + price, tl.div_rn(g * u * phi, divisor))
        momenta = _wide(_get(pieces, piece, _MASK_MOMENTUM), tl.float32, ALIGNED) + at
        velocity = tl.load(momenta, held, 0.0) * mask_momentum + x
        moved = tl.fma(velocity, zero - mask_lr, m)
        anew = (moved > 0) & (m <= 0) & (mask_restart > 0)
        velocity, moved = tl.where(anew, 0.0, velocity), tl.where(anew, mask_restart, moved)
        tl.store(momenta, velocity, held)
        tl.store(masks, moved, held)
    step = tl.fma(w, zero + weight_decay, tl.where(before, g, 0.0))
    if _get(pieces, piece, _MOMENTUM) != 0:
        momenta = _wide(_get(pieces, piece, _MOMENTUM), tl.float32, ALIGNED) + at
        velocity = tl.load(momenta, held, 0.0) * momentum + step
        tl.store(momenta, velocity, held)
        step = tl.fma(velocity, zero + momentum, step) if NESTEROV else velocity
    w = tl.fma(step, zero - lr, w)
    tl.store(weights, w, held)
    after = moved > 0
    _write(pieces, piece, at, tl.where(after, w, 0.0), held, ALIGNED)
    _count(counts + 3 * piece, before, after, held)


@triton.jit
def update(
    chunks, pieces, gradients, prices, divisors, counts,
    lr, momentum, weight_decay, mask_lr, mask_momentum, mask_restart,
    PROXY: tl.constexpr, LEAKY_SLOPE: tl.constexpr, ROOT: tl.constexpr, NESTEROV: tl.constexpr,
    LEARNS: tl.constexpr,
):  # fmt: skip
    """Move w, m and momenta of one chunk per program, write v, add to `counts` [pieces, 3].

    `chunks` holds the piece of each program and the number of its chunk there; `prices` that of
    each piece.
    """
    program = tl.program_id(0)
    piece, chunk = tl.load(chunks + 2 * program), tl.load(chunks + 2 * program + 1)
    grad = tl.load(gradients + piece)
    addresses = grad | _get(pieces, piece, _PARAM) | _get(pieces, piece, _WEIGHT)
    addresses |= _get(pieces, piece, _MASK) | _get(pieces, piece, _MASK_MOMENTUM)
    addresses |= _get(pieces, piece, _MOMENTUM)
    # Slices of a flat tensor may begin anywhere; whole tensors do not.
    if (addresses % 16 == 0) & (_get(pieces, piece, _LENGTH) % 4 == 0):
        _move(
            pieces, piece, chunk, grad, prices, divisors, counts,
            lr, momentum, weight_decay, mask_lr, mask_momentum, mask_restart,
            PROXY, LEAKY_SLOPE, ROOT, NESTEROV, LEARNS, ALIGNED=_YES,
        )  # fmt: skip
    else:
        _move(
            pieces, piece, chunk, grad, prices, divisors, counts,
            lr, momentum, weight_decay, mask_lr, mask_momentum, mask_restart,
            PROXY, LEAKY_SLOPE, ROOT, NESTEROV, LEARNS, ALIGNED=_NO,
        )  # fmt: skip
