"""The settings of what moves the weights: defaults, ranges, and what a rule has no use for."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

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
