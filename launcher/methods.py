"""What is trained: `scl`, or `dense` as the baseline of every claim. A method is its optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.errors import UsageError
from sclcore import SCL, connection_groups


class OptimConfig(BaseModel):
    """How it is optimised, in global terms: nothing here depends on the number of ranks."""

    model_config = ConfigDict(extra="forbid")

    global_batch_size: int = Field(ge=1, description="samples per update, over all ranks")
    epochs: int = Field(ge=1, description="passes over the training data")
    lr: float = Field(gt=0, description="learning rate at this global_batch_size")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of the weights")
    nesterov: bool = Field(default=True, description="Nesterov's form of the momentum")
    weight_decay: float = Field(
        default=1e-4,
        ge=0,
        description="L2 decay of weights (latent ones under scl); none on norms, biases",
    )
    clip_grad_norm: float | None = Field(
        default=None,
        gt=0,
        description="clip the global gradient norm to this; null for no clipping",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="smoothing of the training labels"
    )


class SCLMethod(BaseModel):
    """Sparse Connectivity Learning (arXiv 2201.05020)."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["scl"] = Field(description="learn weights and connectivity together")
    lam: float = Field(ge=0, description="λ, the cost of a connection: the one knob of sparsity")
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
    granularity: str | dict[str, str] = Field(
        default="weight",
        description="what lives or dies together, weight, kernel or feature: one of them, or "
        "patterns of layers with values",
    )
    n_m: str | dict[str, str] | None = Field(
        default=None,
        description="at most N of M neighbours live, such as 2:4: a value, or patterns with values",
    )

    def optimizer(self, model: nn.Module, optim: OptimConfig, example: Tensor) -> SCL:
        """SCL over the connections of `model`; `example` is one input, for its shape alone."""
        try:
            groups = connection_groups(
                model,
                exclude=self.exclude,
                cost=self.cost,
                example_input=example,
                granularity=self.granularity,
                n_m=self.n_m,
            )
            return SCL(
                groups,
                lr=optim.lr,
                momentum=optim.momentum,
                nesterov=optim.nesterov and optim.momentum > 0,
                weight_decay=optim.weight_decay,
                lam=self.lam,
                mask_lr=self.mask_lr,
                mask_momentum=self.mask_momentum,
                proxy=self.proxy,
                normalize=self.normalize,
                mask_init=self.mask_init,
                min_connections=self.min_connections,
                mask_dtype=self.mask_dtype,
            )
        except ValueError as error:
            raise UsageError(f"method: {error}") from error


class DenseMethod(BaseModel):
    """The dense network: SGD with momentum, the same data, schedule and engine."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["dense"] = Field(description="keep every connection")

    def optimizer(self, model: nn.Module, optim: OptimConfig, example: Tensor) -> Optimizer:
        """torch's SGD; biases and norm parameters are not decayed, as under `scl`."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(
            [
                {"params": [p for p in parameters if p.ndim > 1]},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=optim.lr,
            momentum=optim.momentum,
            nesterov=optim.nesterov and optim.momentum > 0,
            weight_decay=optim.weight_decay,
        )


MethodConfig = Annotated[SCLMethod | DenseMethod, Field(discriminator="name")]
