"""Sparse Connectivity Learning as recipes name it; what it does is `sclcore.scl.optimizer.SCL`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sclcore.driver.method import Method
from sclcore.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_PLACES = 1000
_TARGETS = ("target_density", "target_macs")
_SHARE = 0.3
"""Of the mask phase: a connection without gradient dies by then under `mask_lr: auto`."""
_SLIGHT = 1 / 40
"""Of the mask phase: what momentum takes to start counts where it is more."""
_USUAL_LAM = 0.5
"""The λ that `auto` is made for where there is none: a target steers it."""
_LONGEST = 160
"""Updates: a target is met however fast masks are, so that in long runs more of them find each
other's places. Measured in docs/comparison.md."""


class SCLMethod(Method, frozen=True):
    """Sparse Connectivity Learning (arXiv 2201.05020)."""

    look: ClassVar = ("#0072b2", "o")
    zero_stages: ClassVar = (0, 1, 2, 3)
    layerwise: ClassVar = True
    takes_masks: ClassVar = True
    as_it_was: ClassVar = {"mask_restart": 0.0, "mask_gradient": "full"}

    name: Literal["scl"] = Field(
        default="scl", description="learn weights and connectivity together"
    )
    lam: float | None = Field(
        default=None,
        ge=0,
        description="λ, the cost of a connection: the one knob of sparsity, where no target "
        "steers it",
    )
    target_density: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="steer λ so that exactly this share of the connections is left",
    )
    target_macs: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="the same, for this share of the MACs",
    )
    mask_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] = Field(
        default="auto",
        description="learning rate of the mask variables; auto: such that a connection without "
        "gradient dies within 0.3 of the time in which masks learn, under a target within 160 "
        "updates if that is less",
    )
    mask_momentum: float = Field(
        default=0.9, ge=0, lt=1, description="momentum of the mask variables"
    )
    proxy: Literal["identity", "leaky_relu", "softplus", "relu", "clipped"] = Field(
        default="identity",
        description="derivative in place of the unit step's (relu, clipped: get stuck)",
    )
    mask_restart: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="where the mask variable of a connection that comes back to life begins anew "
        "(0: it goes on from where it is)",
    )
    mask_gradient: Literal["full", "root"] = Field(
        default="full",
        description="what the gradient of a connection counts by for its mask variable: its "
        "weight (full), or the root of its weight's size (root, which is the default under a "
        "target)",
    )
    normalize: Literal["network", "layer", "feature", "feature_norm", "none"] = Field(
        default="network",
        description="what mask gradients are divided by: their rms over the network, the layer or "
        "the feature, or their 2-norm over the feature",
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

    @model_validator(mode="before")
    @classmethod
    def _root_under_a_target(cls, values: Any) -> Any:
        # λ is in units of the full gradient, and keeps its scale.
        if isinstance(values, dict) and any(values.get(key) is not None for key in _TARGETS):
            return {"mask_gradient": "root", **values}
        return values

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
        for key in _TARGETS:
            if (value := getattr(self, key)) is not None:
                return key, value
        return None

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        """Whether no update after `step` of `total_steps` changes the masks.

        The choice that meets a target is part of the first update after they have learned.
        """
        last = step - 1 if self.target else step
        return last >= 0 and schedule.masks_are_final(last / total_steps)

    def for_run(self, schedule: Schedule, total_steps: int) -> Self:
        """With a number for `mask_lr: auto`: m_0 · (1 - momentum) / (λ · updates to die in)."""
        if self.mask_lr != "auto":
            return self
        lam = _USUAL_LAM if self.target else self.lam or _USUAL_LAM
        steps = max(1.0, schedule.mask_steps(total_steps))
        per_step = self.mask_init / (self._to_die_in(steps) * lam)
        return self.model_copy(update={"mask_lr": (1 - self.mask_momentum) * per_step})

    def _to_die_in(self, steps: float) -> float:
        """The updates at full speed by which a connection without gradient shall die.

        0.3 of all, and under a target 160 if that is less. Less what momentum takes to start: of n
        updates under a steady force, n - momentum · (1 - momentum^n) / (1 - momentum) count in
        full.
        """
        updates = min(_SHARE * steps, _LONGEST) if self.target else _SHARE * steps
        least = max(1.0, updates)
        start = self.mask_momentum * (1 - self.mask_momentum**least) / (1 - self.mask_momentum)
        return least - start if start > _SLIGHT * steps else updates

    def foreseen(self, schedule: Schedule, total_steps: int) -> list[str]:
        """A λ of no use, or one under which a connection without gradient would outlive masks."""
        if self.target and self.lam is not None:
            return [f"method.lam is not used: {self.target[0]} steers λ"]
        if not self.lam or self.mask_lr == "auto":
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
        enough = self.mask_lr * to_die / self._to_die_in(steps)
        return [
            f"warning: masks-too-slow: a connection without any gradient takes {to_die:,.0f} "
            f"updates to die, and masks learn in {learning:,.0f} of this run's {total_steps:,}: "
            f"the network would stay dense; method.mask_lr=auto would do, or {enough:.2g}"
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
        if self.mask_lr == "auto":
            raise ValueError("mask_lr: auto depends on the length of the run: ask for_run() first")
        own = self.model_dump(include={*SETTINGS})
        return SCL(groups, **{**weights, **own, "lam": self.lam or 0.0})
