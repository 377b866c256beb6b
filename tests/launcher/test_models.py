"""Models by name."""

from __future__ import annotations

import pytest
import torch

from launcher.errors import UsageError
from launcher.models import ModelConfig, create_model, model_on_meta


def test_the_small_convnet() -> None:
    model = create_model(ModelConfig(name="small_convnet"), num_classes=7, in_chans=3)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert model(torch.zeros(2, 3, 28, 28)).shape == (2, 7)


def test_group_norm_has_no_statistics() -> None:
    config = ModelConfig(name="small_convnet", kwargs={"norm": "group", "width": 8})
    assert list(create_model(config, num_classes=10, in_chans=1).buffers()) == []


def test_a_model_of_timms_with_kwargs() -> None:
    config = ModelConfig(name="resnet18", kwargs={"drop_path_rate": 0.1})
    model = create_model(config, num_classes=5, in_chans=1).eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 5)


def test_an_unknown_model_with_its_neighbours() -> None:
    with pytest.raises(UsageError, match=r"no model 'resnet5'; did you mean .*resnet50"):
        create_model(ModelConfig(name="resnet5"), num_classes=10, in_chans=3)


@pytest.mark.parametrize("name", ["resnet18", "small_convnet"])
def test_kwargs_a_model_does_not_take(name: str) -> None:
    config = ModelConfig(name=name, kwargs={"wings": 2})
    with pytest.raises(UsageError, match=f"model {name} cannot be built with kwargs .*wings"):
        create_model(config, num_classes=10, in_chans=3)


def test_an_image_size_the_model_does_not_take() -> None:
    config = ModelConfig(name="vit_tiny_patch16_224")
    with pytest.raises(UsageError, match=r"does not take images of 3×8×8 \(data.image_size\)"):
        model_on_meta(config, num_classes=10, in_chans=3, image_size=8)
    model, image = model_on_meta(config, num_classes=10, in_chans=3, image_size=224)
    assert image.shape == (1, 3, 224, 224)
    assert all(p.is_meta for p in model.parameters())
