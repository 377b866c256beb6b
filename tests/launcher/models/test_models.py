"""Models by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.errors import UsageError
from launcher.models import create_model, model_on_meta
from launcher.recipe.model import ModelConfig


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


@pytest.mark.parametrize(
    ("name", "classes", "channels", "parameters"),
    [
        # He et al. 2015, table 6: 0.27 M and 0.85 M.
        ("cifar_resnet20", 10, 3, 269_722),
        ("cifar_resnet56", 10, 3, 853_018),
        # 14.7 M: convolutions, batch norm, classifier.
        ("cifar_vgg16_bn", 10, 3, 14_710_464 + 8_448 + 5_130),
        # Zagoruyko and Komodakis 2016, table 4: 36.5 M.
        ("cifar_wrn28_10", 10, 3, 36_479_194),
        ("cifar_wrn28_10", 100, 3, 36_536_884),
        ("lenet_300_100", 10, 1, 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
        ("lenet_300_100", 10, 1, 266_610),
        ("lenet5_caffe", 10, 1, 431_080),
    ],
)
def test_the_literatures_networks_have_the_literatures_size(
    name: str, classes: int, channels: int, parameters: int
) -> None:
    size = 28 if channels == 1 else 32
    config = ModelConfig(name=name)
    model, _ = model_on_meta(config, num_classes=classes, in_chans=channels, image_size=size)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_shortcut_between_stages_is_every_second_pixel_and_zeros() -> None:
    model = create_model(ModelConfig(name="cifar_resnet20"), num_classes=10, in_chans=3).eval()
    block: Any = model.get_submodule("blocks.3")
    with torch.no_grad():
        for norm in (block.norm1, block.norm2):
            norm.weight.zero_()  # what is left is the shortcut
    maps = torch.rand(2, 16, 8, 8)
    out = block(maps)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, :16], maps[:, :, ::2, ::2]) and not out[:, 16:].any()


def test_the_literatures_networks_learn_and_take_other_depths() -> None:
    for name in ("cifar_resnet20", "lenet5_caffe"):
        channels, size = (1, 28) if name.startswith("lenet") else (3, 16)
        torch.manual_seed(1)
        model = create_model(ModelConfig(name=name), num_classes=3, in_chans=channels)
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(12, channels, size, size, generator=generator)
        labels = torch.arange(12) % 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.5 * losses[0], name
    narrow = ModelConfig(name="cifar_resnet20", kwargs={"width": 8})
    assert create_model(narrow, num_classes=5, in_chans=1)(torch.zeros(1, 1, 8, 8)).shape == (1, 5)
    lenet = ModelConfig(name="lenet5_caffe", kwargs={"width": 8, "image_size": 32, "active": True})
    assert create_model(lenet, num_classes=5, in_chans=1)(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
    config = ModelConfig(name="cifar_wrn28_10", kwargs={"depth": 16, "width": 2})
    assert create_model(config, num_classes=5, in_chans=1)(torch.zeros(1, 1, 8, 8)).shape == (1, 5)
    with pytest.raises(UsageError, match=r"depth must be 6n \+ 4, such as 16 or 28, not 20"):
        create_model(
            ModelConfig(name="cifar_wrn28_10", kwargs={"depth": 20}), num_classes=5, in_chans=1
        )
