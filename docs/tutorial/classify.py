"""A sparse model at work, without SCL and without PyTorch: images in, names of classes out.

    python docs/tutorial/classify.py runs/glyphs_onnx photo.png …

Needs onnxruntime, numpy and Pillow. What it must know of the images is in the export.json beside
the model: their size, how they are scaled and normalised, and the names of the classes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image


def load(path: Path, about: dict[str, Any]) -> np.ndarray:
    """One image as the network was trained to see it: float32 [channels, height, width]."""
    image = Image.open(path).convert("L" if about["in_chans"] == 1 else "RGB")
    scale, size = about["shorter_side"] / min(image.size), about["image_size"]
    filtering = Image.Resampling[about["interpolation"].upper()]
    image = image.resize([int(scale * side) for side in image.size], filtering)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    pixels = (pixels.reshape(size, size, -1) - about["mean"]) / about["std"]
    return pixels.transpose(2, 0, 1).astype(np.float32)


def main(folder: Path, images: list[Path]) -> None:
    about = json.loads((folder / "export.json").read_text())["network"]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    batch = np.stack([load(path, about) for path in images])
    [logits] = session.run(["logits"], {"images": batch})
    for path, scores in zip(images, np.asarray(logits), strict=True):
        shares = np.exp(scores - scores.max())
        best = int(scores.argmax())
        print(f"{path}: {about['classes'][best]} ({shares[best] / shares.sum():.1%})")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
