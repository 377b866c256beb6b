"""Networks for images of a few pixels: MNIST's two LeNets, and a ConvNet to watch being trained."""

from __future__ import annotations

from torch import Tensor, nn


class SmallConvNet(nn.Module):
    """Three 3×3 convolutions with batch norm and one classifier, for images of a few pixels.

    Input [batch, in_chans, height, width], output [batch, num_classes]. `width` is the number of
    features of the first convolution, doubled in the other two. `norm` is `batch`, or `group` for
    statistics that do not depend on how the batch is cut over ranks.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, width: int = 32, norm: str = "batch"
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(in_chans, width, norm),
            *_block(width, 2 * width, norm),
            nn.MaxPool2d(2),
            *_block(2 * width, 2 * width, norm),
            nn.AdaptiveAvgPool2d(2),
        )
        self.classifier = nn.Linear(2 * width * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


class LeNet300100(nn.Module):
    """LeNet-300-100: two hidden layers (LeCun et al. 1998), as the pruning literature has it.

    Input [batch, in_chans, 28, 28]; 266,610 parameters for MNIST.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_chans * 28 * 28, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.fc1(images.flatten(1)).relu()
        return self.fc3(self.fc2(hidden).relu())


class LeNet5Caffe(nn.Module):
    """LeNet-5 in Caffe's form, which the pruning literature compares on: 20 and 50 filters of 5×5.

    Input [batch, in_chans, image_size, image_size]; 431,080 parameters for MNIST. `width` is the
    number of filters of the first convolution; the second has 5/2 as many, the hidden layer 25
    times. `active` puts a ReLU behind each convolution, where Caffe's has none.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        width: int = 20,
        image_size: int = 28,
        active: bool = False,
    ) -> None:
        super().__init__()
        second, hidden = 5 * width // 2, 25 * width
        left = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_chans, width, 5)
        self.conv2 = nn.Conv2d(width, second, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(second * left**2, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self._between = nn.ReLU() if active else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        maps = self._between(self.pool(self.conv1(images)))
        maps = self._between(self.pool(self.conv2(maps)))
        return self.fc2(self.fc1(maps.flatten(1)).relu())


def _block(inputs: int, outputs: int, norm: str) -> list[nn.Module]:
    norms = {"batch": nn.BatchNorm2d, "group": lambda n: nn.GroupNorm(8, n)}
    if norm not in norms:
        raise ValueError(f"norm must be one of {', '.join(norms)}, not {norm!r}")
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, norms[norm](outputs), nn.ReLU(inplace=True)]
