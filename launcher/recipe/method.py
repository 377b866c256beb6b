"""The `method:` and `optim:` sections of a recipe: what is trained, and how weights move."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from sclcore.driver.method import Method
from sclcore.registry import parse_method


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

    layer_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="each layer's learning rate is this share of the next one's, the classifier "
        "having all of it, as for fine-tuning transformers; null: one rate for all",
    )

    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="keep an exponential moving average of the weights, of this decay an update, "
        "evaluated and written beside them; null for none",
    )

    early_stop_epochs: int | None = Field(
        default=None,
        ge=1,
        description="end the run once top-1 has not risen for so many epochs, counted from when "
        "the connections are final; null: train all epochs",
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
        nesterov = self.nesterov and self.momentum > 0
        return {**common, "momentum": self.momentum, "nesterov": nesterov}


MethodConfig = Annotated[SerializeAsAny[Method], PlainValidator(parse_method)]
