"""Models by name: any of timm's, and those of the literature that timm does not have."""

from launcher.models.build import MODELS, check_training, create_model, model_on_meta
from launcher.models.small import SmallConvNet
from launcher.recipe.model import ModelConfig

__all__ = [
    "MODELS",
    "ModelConfig",
    "SmallConvNet",
    "check_training",
    "create_model",
    "model_on_meta",
]
