"""Networks in which features have died, as pruning lets them die and in every other pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vgg import VGG
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from launcher.models.small import SmallConvNet


class Case(NamedTuple):
    """A network of 5 classes for images of 32 pixels, and how much of it dies at a time."""

    build: Callable[[], nn.Module]
    share: float = 0.15


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **kwargs)


def _vgg() -> nn.Module:
    cfg = [16, "M", 32, "M", 64, 64, "M"]
    return VGG(cfg, num_classes=5, mlp_ratio=0.02, norm_layer=nn.BatchNorm2d)


# The architectures are timm's, some with fewer blocks. Deep chains die of less.
NETWORKS = {
    "small_convnet": Case(lambda: SmallConvNet(num_classes=5, in_chans=3)),
    "vgg": Case(_vgg),
    "resnet18": Case(_timm("resnet18")),
    "resnet50": Case(_timm("resnet50", layers=(1, 1, 1, 1))),
    "mobilenetv2_100": Case(_timm("mobilenetv2_100"), 0.05),
    "efficientnet_b0": Case(_timm("efficientnet_b0"), 0.03),
    "vit_tiny_patch16_224": Case(_timm("vit_tiny_patch16_224", img_size=32, depth=3)),
    "convnext_atto": Case(_timm("convnext_atto", depths=(1, 1, 2, 1))),
    "regnety_002": Case(_timm("regnety_002"), 0.05),
    "densenet121": Case(_timm("densenet121", block_config=(3, 3, 3, 3))),
}


def network(name: str, seed: int) -> nn.Module:
    """One of NETWORKS as if trained, then pruned."""
    torch.manual_seed(seed)
    model = NETWORKS[name].build().eval()
    as_trained(model)
    prune(model, seed, NETWORKS[name].share)
    _measure_statistics(model)
    return model


@torch.no_grad()
def _measure_statistics(model: nn.Module) -> None:
    """Batch norms with the statistics of some images, so that signals live through deep nets."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.randn(8, 3, 32, 32))
    model.eval()


@torch.no_grad()
def as_trained(model: nn.Module) -> None:
    """Statistics, shifts and biases that are neither 0 nor 1, such that signals keep their size."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.5)
            if module.running_mean is not None and module.running_var is not None:
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.5)


@torch.no_grad()
def prune(model: nn.Module, seed: int, share: float) -> None:
    """Zero single weights, kernels, whole rows and columns, and the same rows of all layers that
    are equally wide (so that channels of residual sums die in each branch)."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int, part: float) -> Tensor:
        return torch.rand(count, generator=generator) < part

    aligned: dict[int, Tensor] = {}
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight = module.weight
        rows, columns = weight.shape[:2]
        # Of a depthwise 3 × 3 kernel on a small map little more than its centre counts.
        single = 0.5 if columns > 1 else 0.1
        weight[some(weight.numel(), single).view(weight.shape)] = 0
        weight[some(rows, share)] = 0
        if columns > 3:  # neither colours nor depthwise
            weight[:, some(columns, share)] = 0
        weight[aligned.setdefault(rows, some(rows, share))] = 0
        if isinstance(module, nn.Conv2d) and columns > 1:
            kernels = some(rows * columns, 0.3).view(rows, columns)
            weight[kernels] = 0
    for module in model.modules():
        if hasattr(module, "qkv") and hasattr(module, "head_dim"):
            _kill_a_head(module)


def _kill_a_head(attention: Any) -> None:
    width = attention.head_dim
    attention.qkv.weight[2 * attention.attn_dim :][:width] = 0
    attention.proj.weight[:, width : 2 * width] = 0


class RandomNet(nn.Module):
    """Convolutions of random widths, kernels, paddings and groups, residual sums, concatenations
    and gates, with smooth activations, in which a gradient is 0 only where nothing depends."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def pick(*choices: Any) -> Any:
            return choices[int(torch.randint(len(choices), (1,), generator=generator))]

        self.kinds: list[str] = []
        self.blocks = nn.ModuleList()
        channels = 3
        for _ in range(pick(3, 4, 5)):
            kind = pick("plain", "plain", "residual", "concatenate", "gate", "depthwise", "grouped")
            kind = "plain" if channels == 3 else kind
            out = pick(6, 8) if kind in ("plain", "concatenate") else channels
            groups = {"depthwise": channels, "grouped": 2}.get(kind, 1)
            if channels % groups:
                kind, groups = "plain", 1
            kernel = 1 if kind == "gate" else pick(1, 3)
            keeps = kind != "plain" or pick(True, False)
            layers: list[nn.Module] = [
                nn.Conv2d(channels, out, kernel, padding=kernel // 2 if keeps else 0, groups=groups)
            ]
            layers += [nn.BatchNorm2d(out)] if pick(True, False) else []
            layers += [pick(nn.SiLU, nn.Tanh, nn.GELU, nn.Identity)()]
            self.blocks.append(nn.Sequential(*layers))
            self.kinds.append(kind)
            channels = channels + out if kind == "concatenate" else out
        self.flat = pick(True, False)
        self.head = nn.Linear(channels * (4 if self.flat else 1), 4)
        as_trained(self)
        prune(self, seed, share=0.12)

    def forward(self, x: Tensor) -> Tensor:
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            y = block(x)
            if kind == "residual":
                y = x + y
            elif kind == "concatenate":
                y = torch.cat([x, y], 1)
            elif kind == "gate":
                y = x * torch.sigmoid(y.mean((2, 3), keepdim=True))
            x = y
        x = nn.functional.adaptive_avg_pool2d(x, 2 if self.flat else 1)
        return self.head(x.flatten(1))
