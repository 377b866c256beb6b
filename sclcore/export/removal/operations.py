"""What kinds of operation there are: which elements of a result depend on which of the arguments.

Only what is named here is understood. Everything else counts as mixing all of its inputs, so that
nothing that reaches it is ever removed.
"""

from __future__ import annotations

from enum import Enum, auto

from sclcore.export.removal.program import Program, Step


class Kind(Enum):
    MOVE = auto()  # elements change places: view, cat, permute …
    ELEMENTWISE = auto()  # each element on its own, several arguments broadcast
    LAYER = auto()  # linear and convolution with a parameter as weight
    BATCH_NORM = auto()  # per channel, with stored statistics
    NORM = auto()  # statistics over some dimensions: layer norm, softmax
    REDUCE = auto()  # mean or sum over some dimensions
    POOL = auto()  # per channel over positions
    ATTENTION = auto()  # scaled dot product
    OTHER = auto()


MULTIPLY = {"mul"}
BATCH_NORMS = {"batch_norm", "_native_batch_norm_legit_no_training"}

_MOVES = {
    *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
    *("permute", "transpose", "t", "numpy_T", "select", "slice", "unbind", "split", "chunk", "cat"),
    *("split_with_sizes", "stack", "narrow", "getitem", "clone", "contiguous", "alias", "detach"),
    *("lift_fresh_copy", "roll", "flip", "repeat", "constant_pad_nd", "pad"),
}
_ELEMENTWISE = {
    *("relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "elu"),
    *("leaky_relu", "mish", "softplus", "selu", "celu", "relu6", "clamp", "clamp_min", "clamp_max"),
    *("neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "reciprocal", "erf", "softsign"),
    *("add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "where", "dropout"),
    *("native_dropout", "_to_copy", "to", "type_as", "logsigmoid", "log_sigmoid"),
}
_LAYERS = {"linear", "conv1d", "conv2d", "conv3d", "convolution"}
_NORMS = {"layer_norm", "group_norm", "rms_norm", "softmax", "_softmax", "log_softmax"}
_REDUCTIONS = {"mean", "sum"}
_POOLS = {
    f"{kind}_pool{n}d"
    for kind in ("max", "avg", "adaptive_avg", "_adaptive_avg", "adaptive_max")
    for n in (1, 2, 3)
}
_KINDS = {
    **dict.fromkeys(_MOVES, Kind.MOVE),
    **dict.fromkeys(_ELEMENTWISE, Kind.ELEMENTWISE),
    **dict.fromkeys(_LAYERS, Kind.LAYER),
    **dict.fromkeys(_NORMS, Kind.NORM),
    **dict.fromkeys(_REDUCTIONS, Kind.REDUCE),
    **dict.fromkeys(_POOLS, Kind.POOL),
    **dict.fromkeys(BATCH_NORMS, Kind.BATCH_NORM),
    "scaled_dot_product_attention": Kind.ATTENTION,
}


def kind_of(step: Step, program: Program) -> Kind:
    """The kind of `step`, or OTHER where its arguments make it something not understood."""
    kind = _KINDS.get(step.op, Kind.OTHER)
    refused = {
        Kind.LAYER: lambda: not _is_layer(step, program),
        Kind.BATCH_NORM: lambda: step.op == "batch_norm" and bool(argument(step, 5)),
        Kind.ATTENTION: lambda: not _is_plain_attention(step),
        Kind.ELEMENTWISE: lambda: "dropout" in step.op and bool(argument(step, 2)),
        Kind.REDUCE: lambda: "dtype" in step.kwargs or not isinstance(argument(step, 1), list),
        Kind.MOVE: lambda: step.op == "pad" and argument(step, 2, "constant") != "constant",
    }.get(kind)
    return Kind.OTHER if refused and refused() else kind


def argument(step: Step, position: int, default: object = None) -> object:
    return step.args[position] if len(step.args) > position else default


def _is_layer(step: Step, program: Program) -> bool:
    """A parameter as weight; not transposed; a batch dimension first, for a convolution."""
    if program.parameter(step.args[1]) is None or step.kwargs:
        return False
    bias = argument(step, 2)
    if bias is not None and program.parameter(bias) is None:
        return False
    if step.op == "linear":
        return True
    if step.op == "convolution" and step.args[6]:
        return False
    return program.value(step.args[0]).ndim == program.value(step.args[1]).ndim


def _is_plain_attention(step: Step) -> bool:
    extra = [a for a in step.args[3:5] if a]  # a mask, dropout
    return not extra and not (step.kwargs.keys() - {"is_causal", "scale"})
