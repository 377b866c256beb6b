"""`scl predict`: what the written model of a run says of single images."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data.augmentation.transforms import Transform, eval_transform
from data.images.decode import CorruptImage
from data.packing.encoding import Encoding
from data.stream.pipeline import normalise
from launcher.cluster.accelerator import accelerator
from launcher.errors import UsageError
from launcher.evaluation.predictions import load_network
from launcher.evaluation.samples import READABLE, Known, known_of
from launcher.folder.needed import check_run
from launcher.recipe.load import load_recipe
from launcher.terminal import Pace, say

_BATCH = 64


@dataclass(frozen=True)
class Classified:
    """`probabilities`, float64 [images, classes], of each of `images`; `classes` are their names.

    Where `problems` has an image, it could not be read, why, and its row is NaN.
    """

    images: list[Path]
    classes: list[str]
    probabilities: NDArray[np.float64]
    problems: dict[Path, str]

    def best(self, row: int, count: int = 1) -> list[tuple[str, float]]:
        """The `count` most probable classes of image number `row`, with their probabilities."""
        order = np.argsort(-self.probabilities[row], kind="stable")[:count]
        return [(self.classes[k], float(self.probabilities[row, k])) for k in order]

    def as_csv(self) -> str:
        """A line for each image: its path, class and probability, then that of every class."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "class", "probability", *self.classes])
        for row, path in enumerate(self.images):
            if path in self.problems:
                writer.writerow([path, *[""] * (2 + len(self.classes))])
                continue
            [(name, probability)] = self.best(row)
            shares = [f"{share:.6g}" for share in self.probabilities[row]]
            writer.writerow([path, name, f"{probability:.6g}", *shares])
        return text.getvalue()


def classify(run: Path, images: Sequence[Path], *, model: Path | None = None) -> Classified:
    """The probabilities of all classes for each image, read, scaled and cropped as in training.

    Of a folder among `images`, those in it and below. `model` replaces the run's own weights.
    Raises UsageError where the run has no model, or there is no image.
    """
    check_run(run, "recipe.yaml", *(() if model else ("model.safetensors",)))
    files = [*found(images)]
    recipe = load_recipe(run / "recipe.yaml")
    known = known_of(run, recipe)
    network, device = load_network(recipe, known, model or run, run), torch.device(accelerator())
    transform = eval_transform(recipe.data, known.image)
    shape = (recipe.data.image_size, recipe.data.image_size, known.image.channels)
    rows = np.full((len(files), len(known.classes)), np.nan)
    problems: dict[Path, str] = {}
    pace = Pace()
    for begin in range(0, len(files), _BATCH):
        if pace.is_due():
            say(f"{begin:,} of {len(files):,} images, {pace.seconds:.0f} s so far")
        batch = torch.zeros(len(files[begin : begin + _BATCH]), *shape, dtype=torch.uint8)
        for place, path in enumerate(files[begin : begin + _BATCH]):
            if problem := _read(path, transform, known, batch[place]):
                problems[path] = problem
        pixels = normalise(batch.permute(0, 3, 1, 2).to(device), known.image)
        with torch.no_grad():
            shares = network(pixels).double().softmax(1).cpu().numpy()
        sound = [path not in problems for path in files[begin : begin + _BATCH]]
        rows[begin : begin + len(batch)][sound] = shares[sound]
    return Classified(files, known.names, rows, problems)


def found(images: Sequence[Path]) -> Iterator[Path]:
    """The files among `images`, and all images in the folders among them, sorted."""
    for path in images:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix[1:].lower() in READABLE)
            inside = [p for p in inside if p.is_file() and not p.name.startswith(".")]
            if not inside:
                raise UsageError(f"{path} holds no images ({', '.join(sorted(READABLE))})")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise UsageError(f"there is no image or folder {path}")


def _read(path: Path, transform: Transform, known: Known, out: torch.Tensor) -> str | None:
    """Fill `out` with the pixels of an image; returns why that cannot be done."""
    try:
        content, _ = Encoding(background=known.background).image(path.read_bytes(), "")
        transform(content, 0, out)
    except CorruptImage as error:
        return str(error).partition(": ")[2] or str(error)
    # Pillow, which looks for transparency, has no one class for what is no image.
    except Exception as error:
        return " ".join(str(error).partition(" <_io.")[0].split())
    return None
