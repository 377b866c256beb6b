"""A miniature ImageNet in the shape of the real download: tars of tars, devkit, oddities."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# ILSVRC2012_ID is not the order of WordNet ids; torchvision's labels are the latter.
WNIDS = ("n02119789", "n01440764", "n02100735", "n07753592", "n01443537", "n03026506")
WORDS = (
    "kit fox, Vulpes macrotis",
    "tench, Tinca tinca",
    "English setter",
    "banana",
    "goldfish, Carassius auratus",
    "Christmas stocking",
)
DEVKIT_ROOT = "ILSVRC2012_devkit_t12"


@dataclass(frozen=True)
class MiniImageNet:
    """The folder of tars, and what is in them: (WordNet id, bytes) by file name."""

    folder: Path
    train: dict[str, tuple[str, bytes]]
    val: dict[str, tuple[str, bytes]]

    @property
    def classes(self) -> list[str]:
        return sorted({wnid for wnid, _ in self.train.values()})


def write_imagenet(
    folder: Path, *, per_class: int = 10, val: int = 24, side: int = 48
) -> MiniImageNet:
    """Write train and val tars and the devkit of six classes into ``folder``.

    The first four files of the training set are what real ImageNet has a few of: a PNG called
    .JPEG, a CMYK JPEG, one that EXIF turns, and a grey one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    train = {
        f"{wnid}_{int(number)}.JPEG": (wnid, _photograph(rng, side))
        for wnid in WNIDS
        for number in rng.choice(20_000, per_class, replace=False)
    }
    odd = [_photograph(rng, side, oddity) for oddity in ("png", "cmyk", "rotated", "grey")]
    for name, content in zip(list(train), odd, strict=False):
        train[name] = (train[name][0], content)
    truth = rng.permutation(np.arange(val) % len(WNIDS))
    validation = {
        f"ILSVRC2012_val_{i + 1:08d}.JPEG": (WNIDS[k], _photograph(rng, side))
        for i, k in enumerate(truth)
    }
    _write_train(folder / "ILSVRC2012_img_train.tar", train)
    tar_of(
        folder / "ILSVRC2012_img_val.tar", {n: content for n, (_, content) in validation.items()}
    )
    write_devkit(folder / f"{DEVKIT_ROOT}.tar.gz", truth + 1, per_class)
    return MiniImageNet(folder, train, validation)


def _photograph(rng: np.random.Generator, side: int, oddity: str = "") -> bytes:
    """A smooth picture with some noise, of about ``side`` pixels, as camera files are."""
    width, height = side + int(rng.integers(0, side)), side + int(rng.integers(0, side // 2))
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(noisy)
    if oddity in {"cmyk", "grey"}:
        image = image.convert("CMYK" if oddity == "cmyk" else "L")
    exif = Image.Exif()
    if oddity == "rotated":
        exif[0x0112] = 6
    stream = io.BytesIO()
    if oddity == "png":
        image.save(stream, format="PNG")
    else:
        image.save(stream, format="JPEG", quality=90, exif=exif.tobytes() if exif else b"")
    return stream.getvalue()


def tar_of(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def _write_train(path: Path, train: dict[str, tuple[str, bytes]]) -> None:
    classes: dict[str, bytes] = {}
    for wnid in WNIDS:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w") as tar:
            for name, (owner, content) in train.items():
                if owner == wnid:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        classes[f"{wnid}.tar"] = inner.getvalue()
    tar_of(path, classes)


def write_devkit(path: Path, truth: np.ndarray, per_class: int) -> None:
    """Write meta.mat as MATLAB holds it: leaves first, then an inner node above them all."""
    from scipy.io import savemat

    kinds = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
        ("children", "O"),
        ("wordnet_height", "O"),
        ("num_train_images", "O"),
    ]
    synsets = np.zeros((len(WNIDS) + 1, 1), kinds)
    for k, (wnid, words) in enumerate(zip(WNIDS, WORDS, strict=True)):
        nothing = np.zeros((0, 0))
        synsets[k, 0] = (k + 1, wnid, words, "a thing", 0, nothing, 0, per_class)
    everything = np.arange(1, len(WNIDS) + 1)
    synsets[-1, 0] = (len(WNIDS) + 1, "n00001740", "entity", "all", 6, everything, 1, 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    lines = "".join(f"{number}\n" for number in truth)
    files = {
        f"{DEVKIT_ROOT}/readme.txt": b"ILSVRC2012 development kit\n",
        f"{DEVKIT_ROOT}/data/ILSVRC2012_validation_ground_truth.txt": lines.encode(),
        f"{DEVKIT_ROOT}/data/meta.mat": meta.getvalue(),
    }
    tar_of(path, files, "w:gz")
