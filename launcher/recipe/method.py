"""The `method:` and `optim:` sections of a recipe: what is trained, and how weights move."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from launcher.recipe.baselines import MagnitudeMethod, RigLMethod, STRMethod
from sclcore.schedule import Schedule


class OptimConfig(BaseModel):
    """How it is optimised, in global terms: nothing here depends on the number of ranks."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["sgd", "adamw"] = Field(
        default="sgd", description="what moves the weights; masks have their own momentum"
    )
    global_batch_size: int = Field(ge=1, description="samples per update, over all ranks")
    epochs: int = Field(ge=1, description="passes over the training data")
    lr: float = Field(gt=0, description="learning rate at this global_batch_size")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of the weights (sgd)")
    nesterov: bool = Field(default=True, description="Nesterov's form of the momentum (sgd)")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="decay of the averages of gradient and square (adamw)"
    )
    eps: float = Field(
        default=1e-8, gt=0, description="added to the root of the mean square (adamw)"
    )
    weight_decay: float = Field(
        default=1e-4,
        ge=0,
        description="L2 decay of weights (latent ones under scl), decoupled and times lr with "
        "adamw; none on norms, biases and what timm's models except (position embeddings)",
    )
    clip_grad_norm: float | None = Field(
        default=None,
        gt=0,
        description="clip the global gradient norm to this; null for no clipping",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="smoothing of the training labels"
    )

    @field_validator("betas")
    @classmethod
    def _are_decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("should be two numbers of at least 0 and below 1")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        idle = ("momentum", "nesterov") if self.name == "adamw" else ("betas", "eps")
        for key in idle:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} would do nothing with name: {self.name}; leave it out")
        return self

    def weights(self) -> dict[str, Any]:
        """How weights move, as the optimizers with masks take it."""
        common = {"lr": self.lr, "weight_rule": self.name, "weight_decay": self.weight_decay}
        if self.name == "adamw":
            return {**common, "betas": self.betas, "eps": self.eps}
        return {**common, **self.momenta()}

    def momenta(self) -> dict[str, Any]:
        """The momentum of SGD, which STR's thresholds have under AdamW as well."""
        return {"momentum": self.momentum, "nesterov": self.nesterov and self.momentum > 0}


class SCLMethod(BaseModel):
    """Sparse Connectivity Learning (arXiv 2201.05020)."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["scl"] = Field(description="learn weights and connectivity together")
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
    cost: Literal["connections", "macs"] = Field(
        default="connections",
        description="what a connection costs: 1, or in proportion to its MACs",
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

    @property
    def needs_whole_tensors(self) -> bool:
        return False

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        """Whether no update after `step` of `total_steps` changes the masks."""
        return schedule.masks_are_final(step / total_steps)


class DenseMethod(BaseModel):
    """The dense network: the same optimizer of the weights, data, schedule and engine."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["dense"] = Field(description="keep every connection")

    @property
    def needs_whole_tensors(self) -> bool:
        return False

    def masks_are_final(self, schedule: Schedule, step: int, total_steps: int) -> bool:
        return True


MethodConfig = Annotated[
    SCLMethod | DenseMethod | MagnitudeMethod | RigLMethod | STRMethod, Field(discriminator="name")
]
