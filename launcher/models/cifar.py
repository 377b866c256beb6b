"""The networks of the CIFAR literature, for images of 32×32 pixels; timm has those for 224."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class CifarResNet(nn.Module):
    """He et al. 2015 (arXiv 1512.03385), section 4.2: 6n + 2 layers, three stages of basic blocks.

    Shortcuts between stages have no parameters: every second pixel, zeros for the new features.
    Input [batch, in_chans, height, width], output [batch, num_classes]. `width` is the number of
    features of the first stage, doubled in each of the other two.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, in_chans: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        if blocks < 1 or depth != 6 * blocks + 2:
            raise ValueError(f"depth must be 6n + 2, such as 20 or 56, not {depth}")
        self.conv = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width] * blocks + [2 * width] * blocks + [4 * width] * blocks
        inputs = [width, *widths[:-1]]
        self.blocks = nn.Sequential(
            *(_BasicBlock(i, o) for i, o in zip(inputs, widths, strict=True))
        )
        self.fc = nn.Linear(4 * width, num_classes)
        _he_initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.blocks(self.norm(self.conv(images)).relu())
        return self.fc(maps.mean((2, 3)))


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.added = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        short = pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        inner = self.norm1(self.conv1(maps)).relu()
        return (short + self.norm2(self.conv2(inner))).relu()


class CifarVGG(nn.Module):
    """VGG-16 with batch norm (arXiv 1409.1556) as pruning papers have it for CIFAR: one classifier.

    Input [batch, in_chans, height, width], a multiple of 32 pixels; output [batch, num_classes].
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_chans
        for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(convolutions):
                layers.append(nn.Conv2d(inputs, width, 3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, num_classes)
        _he_initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class WideResNet(nn.Module):
    """Zagoruyko and Komodakis 2016 (arXiv 1605.07146): 6n + 4 layers, pre-activated, k times wide.

    Input [batch, in_chans, height, width], output [batch, num_classes].
    """

    def __init__(
        self, depth: int = 28, width: int = 10, num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        if blocks < 1 or depth != 6 * blocks + 4:
            raise ValueError(f"depth must be 6n + 4, such as 16 or 28, not {depth}")
        self.conv = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        inputs = 16
        for outputs, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for number in range(blocks):
                stages.append(_WideBlock(inputs, outputs, 1 if number else stride))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, num_classes)
        _he_initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.norm(self.blocks(self.conv(images))).relu()
        return self.fc(maps.mean((2, 3)))


class _WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        active = self.norm1(maps).relu()
        short = maps if self.shortcut is None else self.shortcut(active)
        return short + self.conv2(self.norm2(self.conv1(active)).relu())


def _he_initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
