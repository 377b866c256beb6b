"""Sparse Connectivity Learning as recipes name it; what it does is `sclcore.scl.optimizer.SCL`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sclcore.driver.method import Method
from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_PLACES = 1000
# Share of the time in which masks learn. A connection without gradient should have died by then.
_SHARE = 0.25


class SCLMethod(Method, frozen=True):
    """Sparse Connectivity Learning (arXiv 2201.05020)."""

    look: ClassVar = ("#0072b2", "o")
    zero_stages: ClassVar = (0, 1, 2)
    takes_masks: ClassVar = True

    name: Literal["scl"] = Field(
        default="scl", description="learn weights and connectivity together"
    )
    lam: float | None = Field(
        default=None,
        ge=0,
        description="λ, the cost of a connection: the one knob of sparsity; with a target, where "
        "it begins (null: a connection without gradient would die at the end)",
    )
    target_density: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="steer λ until this share of the connections is left",
    )
    target_macs: float | None = Field(
        default=None, gt=0, lt=1, description="steer λ until this share of the MACs is left"
    )
    mask_lr: float = Field(default=1e-3, gt=0, description="learning rate of the mask variables")
    mask_momentum: float = Field(
        default=0.9, ge=0, lt=1, description="momentum of the mask variables"
    )
    proxy: Literal["identity", "leaky_relu", "softplus", "relu", "clipped"] = Field(
        default="identity",
        description="derivative in place of the unit step's (relu, clipped: get stuck)",
    )
    normalize: Literal["feature", "layer", "none"] = Field(
        default="feature", description="what mask gradients are normalised by"
    )
    cost: Literal["connections", "macs", "latency"] = Field(
        default="connections",
        description="what a connection costs: 1, or as its MACs, or its time in the native runtime",
    )
    mask_init: float = Field(default=1.0, gt=0, description="initial value of the mask variables")
    min_connections: int = Field(
        default=1, ge=0, description="connections every layer keeps at least"
    )
    mask_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="precision of the mask variables; bfloat16 saves 4 bytes a weight",
    )
    exclude: list[str] = Field(
        default_factory=list, description="patterns of layers that stay dense, such as conv1"
    )
    train_weights: bool = Field(
        default=True,
        description="false: the weights of connections stay as they began, and only masks, biases "
        "and norms learn (pruning from random weights)",
    )
    granularity: str | dict[str, str] = Field(
        default="weight",
        description="what lives or dies together, weight, kernel or feature: one of them, or "
        "patterns of layers with values",
    )
    n_m: str | dict[str, str] | None = Field(
        default=None,
        description="at most N of M neighbours live, such as 2:4: a value, or patterns with values",
    )

    @model_validator(mode="after")
    def _has_one_aim(self) -> Self:
        if self.target_density is not None and self.target_macs is not None:
            raise ValueError("takes target_density or target_macs: λ cannot meet both")
        if self.lam is None and self.target is None:
            raise ValueError("needs lam, or target_density or target_macs in its place")
        if self.target and self.n_m:
            raise ValueError(f"takes {self.target[0]} or n_m: N:M decides the density itself")
        return self

    @property
    def target(self) -> tuple[str, float] | None:
        """The key and value of what λ is steered to; None where it is plain."""
        for key in ("target_density", "target_macs"):
            if (value := getattr(self, key)) is not None:
                return key, value
        return None

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        """Whether no update after `step` of `total_steps` changes the masks."""
        return schedule.masks_are_final(step / total_steps)

    def foreseen(self, schedule: Schedule, total_steps: int) -> list[str]:
        """Whether a connection without any gradient would have died by the time masks freeze."""
        if self.target or not self.lam:
            return []
        learning = schedule.freeze_masks_at * total_steps
        factors = [
            schedule.lam_factor(share) * schedule.mask_lr_factor(share)
            for share in ((place + 0.5) / _PLACES for place in range(_PLACES))
        ]
        steps = sum(factors) / _PLACES * total_steps
        to_die = self.mask_init * (1 - self.mask_momentum) / (self.lam * self.mask_lr)
        if not steps or to_die <= steps:
            return []
        enough = self.mask_lr * to_die / (_SHARE * steps)
        return [
            f"warning: masks-too-slow: a connection without any gradient takes {to_die:,.0f} "
            f"updates to die, and masks learn in {learning:,.0f} of this run's {total_steps:,}: "
            f"the network would stay dense; method.mask_lr={enough:.2g} would do"
        ]

    def build(self, model: nn.Module, example: Tensor, weights: Mapping[str, Any]) -> Optimizer:
        from sclcore.network.connections import connection_groups
        from sclcore.scl.optimizer import SCL, SETTINGS

        groups = connection_groups(
            model,
            exclude=self.exclude,
            cost=self.cost,
            example_input=example,
            granularity=self.granularity,
            n_m=self.n_m,
            **({} if self.train_weights else {"lr": 0.0}),
        )
        own = self.model_dump(include={*SETTINGS})
        return SCL(groups, **{**weights, **own, "lam": self.lam or 0.0})
