"""`scl pack`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands import Commands, add_command

if TYPE_CHECKING:
    from data.manifest import Manifest
    from data.sources import Source


def add(commands: Commands) -> None:
    pack = commands.add_parser("pack", help="pack images into WebDataset shards with a manifest")
    sources = pack.add_subparsers(required=True, metavar="SOURCE")
    more = "Killed and run again, it goes on where it was; done, it leaves everything as it is."
    parser = add_command(
        sources, "digits", _pack_digits, "pack scikit-learn's 1,797 digits (no download)", more
    )
    _add_packing_options(parser)
    parser = add_command(
        sources,
        "imagefolder",
        _pack_imagefolder,
        "pack DIR/train/<class>/… and DIR/val/<class>/…, or DIR/<class>/…",
        more,
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--val-fraction", type=float, help="hold out this share of each class if there is no val"
    )
    _add_packing_options(parser)
    parser = add_command(
        sources, "torchvision", _pack_torchvision, "pack a data set of torchvision's by name", more
    )
    parser.add_argument("name", help="CIFAR10, CIFAR100, MNIST, FashionMNIST or Imagenette")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("runs/downloads"),
        help="where its files are, or are downloaded to (default: runs/downloads)",
    )
    _add_packing_options(parser)
    parser = add_command(
        sources,
        "index",
        _index,
        "count shards written by others (key.jpg + key.cls) and write their manifest",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="one split: a folder of *.tar")


def _add_packing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="gets train/ and val/")
    parser.add_argument("--seed", type=int, default=0, help="decides the shuffle (default: 0)")
    parser.add_argument(
        "--shard-samples", type=int, help="samples per shard (default: about 16 shards a split)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: one per core); the bytes do not depend on it",
    )


def _pack_digits(options: argparse.Namespace) -> int:
    from data.sources import digits

    return _pack(options, digits())


def _pack_imagefolder(options: argparse.Namespace) -> int:
    from data.sources import imagefolder

    return _pack(options, imagefolder(options.folder, options.val_fraction))


def _pack_torchvision(options: argparse.Namespace) -> int:
    from data.sources import torchvision_set

    return _pack(options, torchvision_set(options.name, options.root))


def _pack(options: argparse.Namespace, source: Source) -> int:
    from data.pack import pack

    manifests = pack(
        source,
        options.out,
        shard_samples=options.shard_samples,
        seed=options.seed,
        workers=options.workers,
    )
    for split, manifest in manifests.items():
        _say_packed(options.out / split, manifest)
    return 0


def _index(options: argparse.Namespace) -> int:
    from data.adopt import index_shards

    _say_packed(options.folder, index_shards(options.folder))
    return 0


def _say_packed(folder: Path, manifest: Manifest) -> None:
    print(
        f"{folder}: {manifest.samples:,} samples of {len(manifest.classes)} classes in "
        f"{len(manifest.shards)} shards"
    )
