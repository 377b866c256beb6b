"""How weights move, given their gradient: SGD with momentum, or AdamW; latent and dense ones alike.

Of latent weights the gradient is ∂L/∂w = G ⊙ H(m), with H(m) as it was when the step began. The
arithmetic is torch's own (`torch.optim.SGD`; `torch.optim.AdamW`, fused: Loshchilov and Hutter,
arXiv 1711.05101), so that a network without masks is trained bit for bit as torch trains it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from sclcore.options import AdamW, Options, adamw_of
from sclcore.shards import Piece

WEIGHT_RULES = ("sgd", "adamw")
DEFAULTS: dict[str, Any] = {
    "momentum": 0.9,
    "nesterov": False,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
}
IDLE = {"sgd": ("betas", "eps"), "adamw": ("momentum", "nesterov")}
"""What each rule has no use for."""
BUFFERS = {"momentum": "momentum_buffer", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Field of `Piece` → key in the state, of the tensor's shape. A group counts its updates."""


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone, as is the custom of the field.

    Vectors, which are biases and parameters of norms, and whatever `model.no_weight_decay()` names,
    as timm's vision transformers do: position embeddings and class tokens.
    """
    named = getattr(model, "no_weight_decay", set)()
    return {name for name, p in model.named_parameters() if p.ndim <= 1 or name in named}


def buffers_of(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The state that the group's rule keeps of each weight."""
    if group["weight_rule"] == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if group["momentum"] else ()


def settings_of(
    given: Mapping[str, Any], params: Iterable[Any], weight_rule: str
) -> dict[str, Any]:
    """The settings of the rules that move `params`: those `given`, the defaults for None.

    Raises ValueError where one is given that none of the rules has a use for; no momentum, which is
    0 or false, may be asked of any.
    """
    groups = [each for each in params if isinstance(each, Mapping)]
    rules = {weight_rule, *(group["weight_rule"] for group in groups if "weight_rule" in group)}
    idle_everywhere = set.intersection(*(set(IDLE.get(rule, ())) for rule in rules))
    for name, value in given.items():
        if name in idle_everywhere and value:
            raise ValueError(_idle_sentence(name, weight_rule))
    return {name: DEFAULTS[name] if value is None else value for name, value in given.items()}


def clear_idle(group: dict[str, Any], given: Container[str]) -> None:
    """Set what a group's rule has no use for to what does nothing.

    Raises ValueError where it was `given` for this group; what another optimizer's groups hold is
    taken as it is.
    """
    for name in IDLE.get(group["weight_rule"], ()):
        nothing = type(DEFAULTS[name])() if name in IDLE["adamw"] else DEFAULTS[name]
        if name in given and group[name] != nothing:
            raise ValueError(_idle_sentence(name, group["weight_rule"]))
        group[name] = nothing


def _idle_sentence(name: str, rule: str) -> str:
    return f"{name} would do nothing with weight_rule {rule!r}: leave it out"


def check_rule(group: Mapping[str, Any]) -> None:
    """ValueError with one sentence where an option of the rule is out of its range."""
    if group["weight_rule"] not in WEIGHT_RULES:
        known = ", ".join(WEIGHT_RULES)
        raise ValueError(f"unknown weight_rule {group['weight_rule']!r}: choose one of {known}")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers of at least 0 and below 1, not {betas}")
    if not 0 < group["eps"] < float("inf"):
        raise ValueError(f"eps must be above 0 and finite, not {group['eps']}")
    if group["nesterov"] and not group["momentum"] and group["weight_rule"] == "sgd":
        raise ValueError("nesterov needs a momentum above 0")


def step_weight(piece: Piece, grad: Tensor, before: Tensor, options: Options) -> None:
    """Move w by ∂L/∂w = G ⊙ H(m) and the decay of the latent weight; `before` is H(m) [length]."""
    step = torch.where(before, grad, 0.0)
    rule = options.adamw
    if rule is not None:
        assert piece.exp_avg is not None and piece.exp_avg_sq is not None
        state = ([piece.exp_avg], [piece.exp_avg_sq])
        _adamw([piece.weight], [step], *state, rule, options.lr, options.weight_decay)
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


def step_dense(group: dict[str, Any], state: MutableMapping[Any, dict[str, Any]]) -> None:
    """Move the parameters of a group without connections."""
    params = [p for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    if not params:
        return
    rule = adamw_of(group)
    group["updates"] += 1
    if rule is not None:
        for p in params:
            for key in buffers_of(group):
                if key not in state[p]:
                    state[p][key] = torch.zeros_like(p)
        averages, squares = ([state[p][key] for p in params] for key in buffers_of(group))
        _adamw(params, grads, averages, squares, rule, group["lr"], group["weight_decay"])
        return
    buffers = [state[p].get("momentum_buffer") for p in params]
    sgd(
        params,
        grads,
        buffers,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
        foreach=params[0].is_cuda,
    )
    for p, buffer in zip(params, buffers, strict=True):
        if buffer is not None:
            state[p]["momentum_buffer"] = buffer


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    rule: AdamW,
    lr: float,
    weight_decay: float,
) -> None:
    """One update. The count is handed over anew, since a group's is exact and saved with it."""
    adamw(
        params,
        grads,
        averages,
        squares,
        [],
        [torch.full((), float(rule.updates), device=p.device) for p in params],
        fused=True,
        amsgrad=False,
        beta1=rule.beta1,
        beta2=rule.beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=rule.eps,
        maximize=False,
    )
