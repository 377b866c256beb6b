"""The first recipe for one's own images: chosen from what they are, with a comment at each choice.

The choices are rules of thumb that train on the machine at hand within hours, not results.
"""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from launcher.cluster.accelerator import accelerator
from launcher.recipe.load import build_recipe
from launcher.recipe.schema import SCHEMA_NAME
from launcher.recipe.yaml import Loader
from launcher.start.look import Look

# Up to these shorter sides (pixels), images are learned at their own size.
_TINY, _SMALL, _LARGEST, _LARGEST_ON_CPU = 16, 40, 224, 96
# With fewer images than this a larger network only learns them by heart.
_ENOUGH_FOR_RESNET50 = 50_000
_DENSITY = 0.1
_FREEZE_MASKS_AT = 0.5


@dataclass(frozen=True)
class _Choice:
    model: str
    why: str
    image_size: int
    batch: int
    epochs: int
    lr: float


def first_recipe(look: Look, file: Path, *, on_gpu: bool | None = None) -> str:
    """YAML of a recipe for the images `look` tells of, to be written to `file`.

    `on_gpu`: what it is to be trained on; None for what this machine has.
    """
    on_gpu = accelerator() == "cuda" if on_gpu is None else on_gpu
    choice = _choose(look, on_gpu)
    text = "\n".join(
        [
            *_head(look, file),
            f"name: {look.name}",
            *_model(look, choice),
            *_data(look, choice, on_gpu),
            *_method(file, choice),
            *_optim(choice),
            *_engine(choice, on_gpu),
        ]
    )
    # What is written must be a recipe: a mistake here is ours, and must not be found by the user.
    build_recipe(yaml.load(text, Loader=Loader), (), str(file))
    return f"{text}\n"


def next_commands(look: Look, file: Path) -> list[str]:
    """What to type next: to pack if that has not been done, to train, to train the same dense."""
    train = f"scl train --recipe {shlex.quote(str(file))}"
    dense = f"{train} --set method.name=dense --set name={look.name}_dense"
    compare = f"scl compare runs/{look.name} runs/{look.name}_dense"
    if look.packed:
        return [train, dense, compare]
    pack = f"scl pack imagefolder {shlex.quote(str(look.folder))} --out {_packed(look)}"
    return [pack + (" --background white" if look.transparent else ""), train, dense, compare]


def _packed(look: Look) -> str:
    return str(look.folder) if look.packed else f"runs/data/{look.name}"


def _choose(look: Look, on_gpu: bool) -> _Choice:
    model, why, size = _network(look, on_gpu)
    batch = next((b for b, n in ((256, 100_000), (128, 12_800)) if look.train >= n), 64)
    # Eight updates an epoch at the least.
    batch = max(2, min(batch, 2 ** int(math.log2(max(2, look.train / 8)))))
    steps = look.train // batch
    updates, least, most = (3000, 30, 100) if on_gpu else (1500, 20, 40)
    epochs = min(most, max(least, -(-updates // steps)))
    return _Choice(
        model,
        why,
        size,
        batch,
        epochs,
        lr=_rounded(0.1 * batch / (256 if "resnet18" in model or "resnet50" in model else 128)),
    )


def _network(look: Look, on_gpu: bool) -> tuple[str, str, int]:
    if look.side <= _TINY:
        return "small_convnet", f"Four layers, for images of up to {_TINY} pixels.", look.side
    if look.side <= _SMALL:
        size = 4 * math.ceil(look.side / 4)
        return "cifar_resnet20", f"Twenty layers, for images of up to {_SMALL} pixels.", size
    size = min(32 * math.ceil(look.side / 32), _LARGEST if on_gpu else _LARGEST_ON_CPU)
    if on_gpu and look.train >= _ENOUGH_FOR_RESNET50 and size == _LARGEST:
        return "resnet50", "The usual network for photographs.", size
    why = "Small, for photographs; resnet50 is larger and slower."
    return "resnet18", why, size


def _rounded(value: float) -> float:
    """To two digits, as one writes such numbers."""
    return float(f"{value:.1e}")


def _head(look: Look, file: Path) -> list[str]:
    sizes = f"{look.side}×{look.longer}" if look.side != look.longer else f"{look.side}×{look.side}"
    colour = "grey" if look.channels == 1 else "coloured"
    schema = Path("recipes") / SCHEMA_NAME
    known = (
        [f"# yaml-language-server: $schema={schema}"] if (file.parent / schema).is_file() else []
    )
    return [
        *known,
        f"# {look.classes:,} classes, {look.train:,} images to train on and {look.val:,} to "
        "measure on;",
        f"# {colour}, {sizes} pixels in the middle.",
        "# Written by `scl init`; each value may be changed, here or with --set KEY.SUB=VALUE.",
        "# What every key means: scl recipe",
        "#",
        *(f"#   {command}" for command in next_commands(look, file)),
    ]


def _model(look: Look, choice: _Choice) -> list[str]:
    lines = [
        "model:",
        f"  # {choice.why} Any name that timm knows will do.",
        f"  name: {choice.model}",
    ]
    if choice.model.startswith("resnet"):
        lines += [
            "# Of few photographs, a network trained on others learns more. This fetches it:",
            "# init:",
            "#   weights: timm-pretrained",
        ]
    return lines


def _data(look: Look, choice: _Choice, on_gpu: bool) -> list[str]:
    photographs = choice.model.startswith("resnet")
    lines = [
        "data:",
        f"  path: {yaml.safe_dump(_packed(look)).splitlines()[0]}",
        "  # Height and width at which images are learned.",
        f"  image_size: {choice.image_size}",
    ]
    if choice.image_size == _LARGEST_ON_CPU < look.side and not on_gpu:
        lines.insert(3, f"  # With a GPU, {_LARGEST} would show more.")
    if photographs:
        lines += [
            "  # Crops of random size and shape, at least a third of the image.",
            "  augment: imagenet",
            "  crop_scale: [0.35, 1.0]",
            "  # Mirrors half of the images: wrong where left and right matter, as in letters.",
            "  hflip: true",
        ]
    else:
        lines += [
            "  # Shifts images at random by up to so many pixels.",
            "  augment: crop",
            f"  crop_padding: {max(1, choice.image_size // 8)}",
            "  # true mirrors half of them: wrong where left and right matter, as in letters.",
            "  hflip: false",
        ]
    lines.append(f"  eval_crop_ratio: {0.875 if photographs else 1.0}")
    if on_gpu or photographs:
        workers = min(8, max(1, (os.cpu_count() or 1) - 1), look.train // choice.batch)
        lines += ["  # Processes that read and augment.", f"  workers: {workers}"]
    return lines


def _method(file: Path, choice: _Choice) -> list[str]:
    return [
        "method:",
        "  name: scl",
        "  # The share of the connections that is left in the end. Less is smaller; what it costs",
        "  # in accuracy differs from task to task: try 0.05 and 0.2 as well.",
        f"  target_density: {_DENSITY}",
        "  # The expert's way: a fixed λ, the price of a connection, in place of target_density;",
        "  # the density is what comes of it. Which λ leaves how much is foretold by",
        f"  # scl forecast --recipe {file} --set method.target_density=null --set method.lam=0.2",
        "  # lam: 0.2",
    ]


def _optim(choice: _Choice) -> list[str]:
    return [
        "optim:",
        "  # Passes over the training images. More of them is the surest way to more accuracy.",
        f"  epochs: {choice.epochs}",
        "  # Images per update, over all ranks, and the learning rate at that size.",
        f"  global_batch_size: {choice.batch}",
        f"  lr: {choice.lr}",
        "  weight_decay: 5.0e-4",
        "schedule:",
        "  # Masks learn in the first half; in the second the weights that are left recover.",
        f"  freeze_masks_at: {_FREEZE_MASKS_AT}",
    ]


def _engine(choice: _Choice, on_gpu: bool) -> list[str]:
    if on_gpu:
        return [
            "engine:",
            "  # As many as GPUs to be used; the network learned is the same.",
            "  ranks: 1",
            "  precision: autocast",
        ]
    # Threads that share out a few pixels wait for each other longer than they compute.
    threads = 1 if choice.image_size <= _TINY else min(16, len(os.sched_getaffinity(0)))
    return [
        "engine:",
        "  ranks: 1",
        "  # CPU cores to compute on. With a GPU: threads: 1 and precision: autocast.",
        f"  threads: {threads}",
    ]
