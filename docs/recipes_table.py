"""The tables of docs/recipes.md: what each recipe needs, counted on the meta device.

python docs/recipes_table.py            prints the tables
python docs/recipes_table.py --write    puts them into docs/recipes.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from launcher.models import model_on_meta
from launcher.recipe.engine import accumulation_steps
from launcher.recipe.load import load_recipe
from launcher.recipe.recipe import Recipe
from launcher.start.needs import Size, size_of, state_of

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
DOCUMENT = Path(__file__).with_name("recipes.md")
BEGIN, END = "<!-- {}: python docs/recipes_table.py -->", "<!-- end -->"
# Training images, classes, channels.
SETS: dict[str, tuple[int, int, int]] = {
    "imagenet": (1_281_167, 1000, 3),
    "cifar10": (50_000, 10, 3),
    "cifar100": (50_000, 100, 3),
    "mnist": (60_000, 10, 1),
}
# ResNet-50 at 224 pixels in PyTorch, mixed precision: on one A100 2,470 to 2,600 (NVIDIA's
# DeepLearningExamples, timm #1491), on one H100 2,790, on an H200 3,079 (Lambda).
A100_IMAGES_PER_S, H100_IMAGES_PER_S = 2500, 2790
# An assumption: what launching the kernels of an update takes, however small they are.
LEAST_SECONDS_PER_UPDATE = 0.01
BASIS = "imagenet/resnet50_dense.yaml"
NETWORKS = {
    "ImageNet": [
        *("resnet18", "resnet50", "resnet50_16", "resnet50_40", "mobilenetv2", "efficientnet_b0"),
        *("vit_s16", "deit_b16", "deit_l16", "convnext_t"),
    ],
    "CIFAR and MNIST": [
        *("resnet20_cifar10", "resnet56_cifar10", "vgg16_bn_cifar10", "wrn28_10_cifar10"),
        *("wrn28_10_cifar100", "lenet_300_100", "lenet5_caffe"),
    ],
}


def recipe_of(network: str, method: str) -> Recipe:
    [path] = RECIPES.glob(f"*/{network}_{method}.yaml")
    return load_recipe(path)


def data_of(recipe: Recipe) -> tuple[int, int, int]:
    return SETS[Path(str(recipe.data.path)).name]


def build(recipe: Recipe) -> tuple[nn.Module, Tensor]:
    _, classes, channels = data_of(recipe)
    return model_on_meta(
        recipe.model, num_classes=classes, in_chans=channels, image_size=recipe.data.image_size
    )


def seconds(recipe: Recipe, size: Size, basis: Size, gpus: int, speed: float) -> float:
    """Estimate of a whole run on `gpus`; `speed` in ResNet-50 images per second and GPU.

    An image costs as many of ResNet-50's as it has MACs, or bytes of activations, whichever is
    more: the arithmetic or the memory of the GPU is what it waits for.
    """
    samples, _, _ = data_of(recipe)
    cost = max(size.macs / basis.macs, size.activations / basis.activations)
    optim, data = recipe.optim, recipe.data
    sizes = [data.training_size(epoch, optim.epochs) for epoch in range(optim.epochs)]
    total = 0.0
    for side in sizes:
        per_update = optim.global_batch_size * cost * (side / data.image_size) ** 2
        least = LEAST_SECONDS_PER_UPDATE
        total += samples // optim.global_batch_size * max(per_update / (gpus * speed), least)
    return total


def short(value: float) -> str:
    """Two significant digits."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:#.2g}".rstrip(".")


def gigabytes(value: float) -> str:
    return short(value / 1e9)


def count(value: int) -> str:
    if value < 1e6:
        return f"{value:,}"
    return f"{value / 1e6:.2f} M" if value < 1e8 else f"{value / 1e6:.0f} M"


def macs(value: int) -> str:
    digits = max(0, 2 - math.floor(math.log10(value / 1e9)))
    return f"{value / 1e9:.{digits}f} G" if value >= 1e8 else f"{value / 1e6:.1f} M"


def row(network: str, basis: Size, gpus: Iterable[tuple[int, float]]) -> list[str]:
    dense, scl = recipe_of(network, "dense"), recipe_of(network, "scl")
    model, image = build(scl)
    size = size_of(model, image)
    plain, state = (state_of(recipe, model, image) for recipe in (dense, scl))
    optim, engine = scl.optim, scl.engine
    steps = accumulation_steps(optim.global_batch_size, engine.ranks, engine.max_micro_batch)
    micro_batch = optim.global_batch_size // engine.ranks // steps
    sharded = ["", ""]
    if engine.ranks > 1:
        sharded = [gigabytes(state.per_rank(stage, engine.ranks)) for stage in (1, 2)]
    memory = [plain.per_rank(0, 1), state.per_rank(0, 1)]
    return [
        f"`{network}`",
        count(size.parameters),
        macs(size.macs),
        f"{optim.name}, {optim.epochs} × {data_of(scl)[0] // optim.global_batch_size:,}",
        f"{engine.ranks} × {steps} × {micro_batch}",
        " / ".join([*map(gigabytes, memory), *filter(None, sharded)]),
        gigabytes(size.activations * micro_batch),
        *(short(seconds(scl, size, basis, n, speed) / 3600) for n, speed in gpus),
    ]


def table(title: str, networks: Iterable[str], basis: Size) -> str:
    a100, h100 = float(A100_IMAGES_PER_S), float(H100_IMAGES_PER_S)
    gpus = [(8, a100), (8, h100), (32, h100)]
    names = ["8 A100", "8 H100", "32 H100"]
    if title != "ImageNet":
        gpus, names = [(1, a100), (1, h100)], ["1 A100", "1 H100"]
    head: list[Any] = [
        *("recipe", "parameters", "MACs", "optimizer, epochs × updates"),
        *("ranks × accumulation × micro-batch", "state, GB", "activations, GB"),
        *(f"{name}, h" for name in names),
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [row(network, basis, gpus) for network in networks]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def basis_of() -> Size:
    return size_of(*build(load_recipe(RECIPES / BASIS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put them into docs/recipes.md")
    options = parser.parse_args()
    basis = basis_of()
    text = DOCUMENT.read_text() if options.write else ""
    for title, networks in NETWORKS.items():
        made = table(title, networks, basis)
        print(f"{title}\n\n{made}\n")
        if options.write:
            before, _, rest = text.partition(BEGIN.format(title))
            after = rest.partition(END)[2]
            text = f"{before}{BEGIN.format(title)}\n\n{made}\n\n{END}{after}"
    if options.write:
        DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
