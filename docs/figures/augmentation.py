"""What augmentation makes of the two photographs that scikit-learn ships.

python docs/figures/augmentation.py [--out docs/figures/augmentation.png]
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data.augmentation.mixing import mix, mixed_targets, pair_parameters
from data.augmentation.transforms import sample_seed, train_transform
from data.config import DataConfig
from data.shards.manifest import ImageStats

SIZE, COLUMNS = 176, 6
_IMAGENET = ImageStats(
    channels=3, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], measured_on=1
)
_ROWS: dict[str, dict[str, Any]] = {
    "crop and flip": {},
    "RandAugment": {"randaugment": "rand-m9-mstd0.5-inc1"},
    "random erasing": {"random_erasing": 1.0},
    "mixup 0.8": {"mixup": 0.8},
    "CutMix 1.0": {"cutmix": 1.0},
}


def photographs() -> list[bytes]:
    """China, flower: as JPEG files, since that is what training reads."""
    from sklearn.datasets import load_sample_images

    contents = []
    sample: Any = load_sample_images()
    for pixels in sample.images:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=95)
        contents.append(stream.getvalue())
    return contents


def row(contents: list[bytes], options: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
    """One epoch's images of six samples, taken in turn from the photographs, with captions."""
    config = DataConfig(path=Path(), image_size=SIZE, augment="imagenet", hflip=True, **options)
    transform = train_transform(config, SIZE, _IMAGENET)
    images = torch.empty(COLUMNS, SIZE, SIZE, 3, dtype=torch.uint8)
    for sample in range(COLUMNS):
        transform(contents[sample % len(contents)], sample_seed(0, 3, sample), images[sample])
    if not config.mixing:
        return images.numpy(), [""] * COLUMNS
    batch = pair_parameters(config, np.arange(COLUMNS), SIZE, seed=0, epoch=3)
    batch["label"] = torch.arange(COLUMNS) % len(contents)
    mixed = mix(images.permute(0, 3, 1, 2).float(), batch)
    shares = mixed_targets(batch, len(contents)).tolist()
    captions = [f"china {china:.2f}, flower {flower:.2f}" for china, flower in shares]
    return mixed.permute(0, 2, 3, 1).round().clamp(0, 255).byte().numpy(), captions


def draw(path: Path) -> None:
    contents = photographs()
    figure = Figure(figsize=(11, 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(_ROWS), COLUMNS)
    for line, (name, options) in zip(axes, _ROWS.items(), strict=True):
        images, captions = row(contents, options)
        for ax, pixels, caption in zip(line, images, captions, strict=True):
            ax.imshow(pixels)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_xlabel(caption, fontsize=8)
        line[0].set_ylabel(name, fontsize=11)
    figure.savefig(path, dpi=72)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures/augmentation.png"))
    arguments = parser.parse_args()
    draw(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
