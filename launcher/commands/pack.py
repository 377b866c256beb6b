"""`scl pack`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands import SUMMARIES, Commands, add_command, add_group
from launcher.terminal import importing

if TYPE_CHECKING:
    from data.shards.manifest import Manifest
    from data.sources.source import Source

_MORE = "Killed and run again, it goes on where it was; done, it leaves everything as it is."


def _more(source: str, options: str = "") -> str:
    """What a source's help ends with; `source` is its name and arguments in the example."""
    command = " ".join(filter(None, ["scl pack", source, "--out runs/data/packed", options]))
    return f"{_MORE}\n\nexample:\n  {command}"


def add(commands: Commands) -> None:
    sources = add_group(
        commands,
        "pack",
        SUMMARIES["pack"],
        "example:\n  scl pack digits --out runs/data/digits",
        metavar="SOURCE",
    )
    _add_digits(sources)
    _add_glyphs(sources)
    _add_imagenet(sources)
    _add_imagefolder(sources)
    _add_huggingface(sources)
    _add_torchvision(sources)
    _add_index(sources)
    _add_pieces(sources)


def _add_digits(sources: Commands) -> None:
    parser = add_command(
        sources,
        "digits",
        _pack_digits,
        "pack scikit-learn's 1,797 digits (no download)",
        _more("digits"),
    )
    _add_packing_options(parser)


def _add_glyphs(sources: Commands) -> None:
    parser = add_command(
        sources,
        "glyphs",
        _pack_glyphs,
        "pack the letters and digits of the fonts installed here (20,026 images, 62 classes)",
        _more("glyphs"),
    )
    parser.add_argument(
        "--fonts",
        type=Path,
        action="append",
        metavar="DIR",
        help="a folder with fonts, instead of /usr/share/fonts and /usr/local/share/fonts; may be "
        "repeated",
    )
    _add_packing_options(parser)


def _add_imagenet(sources: Commands) -> None:
    parser = add_command(
        sources,
        "imagenet",
        _pack_imagenet,
        "pack ImageNet (ILSVRC2012) from its tar files, or from folders extracted from them",
        "DIR holds ILSVRC2012_img_train.tar (or train/), ILSVRC2012_img_val.tar (or val/) and\n"
        f"ILSVRC2012_devkit_t12.tar.gz.\n{_more('imagenet /data/ilsvrc', '--max-side 512')}",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", nargs="?")
    parser.add_argument("--train-tar", type=Path, metavar="FILE", help="instead of that in DIR")
    parser.add_argument("--val-tar", type=Path, metavar="FILE", help="instead of that in DIR")
    parser.add_argument(
        "--devkit", type=Path, metavar="FILE", help="class names and labels of val (or its folder)"
    )
    parser.add_argument(
        "--val-labels",
        type=Path,
        metavar="FILE",
        help="lines of a file name and a WordNet id, or Kaggle's LOC_val_solution.csv; "
        "goes before the devkit's",
    )
    _add_packing_options(parser)
    _add_image_options(parser)


def _add_imagefolder(sources: Commands) -> None:
    parser = add_command(
        sources,
        "imagefolder",
        _pack_imagefolder,
        "pack DIR/train/<class>/… and DIR/val/<class>/…, or DIR/<class>/…",
        "Splits may also be called training, valid, validation, test or testing. A test folder is\n"
        f"val where there is no other.\n{_more('imagefolder photographs')}",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="SHARE",
        help="hold out this share of each class if there is no val (default: 0.1 if there is no "
        "test either; 0: none)",
    )
    _add_leave_out(parser)
    _add_packing_options(parser)
    _add_image_options(parser)


def _add_huggingface(sources: Commands) -> None:
    parser = add_command(
        sources,
        "huggingface",
        _pack_huggingface,
        "pack the parquet files of an image data set of the Hugging Face hub",
        f"Needs pyarrow: pip install 'scl-train[huggingface]'.\n{_more('huggingface downloaded')}",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--config", metavar="NAME", help="which configuration, where DIR holds several"
    )
    parser.add_argument("--image-column", help="default: the only one that holds images")
    parser.add_argument("--label-column", help="default: the only one that holds class labels")
    _add_packing_options(parser)
    _add_image_options(parser)


def _add_torchvision(sources: Commands) -> None:
    parser = add_command(
        sources,
        "torchvision",
        _pack_torchvision,
        "pack a data set of torchvision's by name",
        _more("torchvision CIFAR10"),
    )
    parser.add_argument("name", help="CIFAR10, CIFAR100, MNIST, FashionMNIST or Imagenette")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("runs/downloads"),
        help="where its files are, or are downloaded to (default: runs/downloads)",
    )
    _add_packing_options(parser)
    _add_image_options(parser)


def _add_index(sources: Commands) -> None:
    parser = add_command(
        sources,
        "index",
        _index,
        "count shards written by others (key.jpg + key.cls) and write their manifest",
        "example:\n  scl pack index shards/train",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="one split: a folder of *.tar")
    parser.add_argument(
        "--label-from",
        metavar="json:FIELD",
        help="take the label from this field of key.json instead of key.cls",
    )
    _add_leave_out(parser)


def _add_pieces(sources: Commands) -> None:
    parser = add_command(
        sources,
        "pieces",
        _pieces,
        "say where packed shards may be cut, so that machines fetch parts of them from a store",
        "Writes pieces.npz beside the index; shards, manifest and index stay as they are. What is\n"
        "packed or indexed today has it.\n\nexample:\n  scl pack pieces runs/data/imagenet",
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="one split, or the folder of train/ and val/"
    )
    _add_workers(parser)


def _add_leave_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--leave-out",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the images that may be left out, for what cannot be read; what is left "
        "out is named (default: 0.01)",
    )


def _add_packing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="gets train/ and val/")
    parser.add_argument("--seed", type=int, default=0, help="decides the shuffle (default: 0)")
    parser.add_argument(
        "--shard-samples", type=int, help="samples per shard (default: about 16 shards a split)"
    )
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes (default: one per core); the bytes do not depend on it",
    )


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-side",
        type=int,
        metavar="PIXELS",
        help="scale images down whose longer side has more pixels; they become JPEG, upright; "
        "all others keep their bytes (default: all keep them)",
    )
    parser.add_argument(
        "--quality", type=int, help="JPEG quality of the images made smaller (default: 90)"
    )
    parser.add_argument(
        "--captions",
        metavar="TEXT",
        help='write key.txt for open_clip; "a photo of a {}" gets the class name',
    )
    parser.add_argument(
        "--background",
        metavar="COLOUR",
        help="what shows where an image is transparent: white, #f0f0f0 …; none: whatever colours "
        "it has there (default: such images are refused)",
    )


def _pack_digits(options: argparse.Namespace) -> int:
    with importing("scikit-learn"):
        from data.sources.digits import digits

    return _pack(options, digits)


def _pack_glyphs(options: argparse.Namespace) -> int:
    with importing("what packing needs"):
        from data.packing.claim import check_kind
        from data.sources.glyphs import FOLDERS, glyphs

    def source() -> Source:
        # Drawing takes a while: nothing of that for a folder that will be refused.
        check_kind(options.out, "glyphs")
        return glyphs(options.fonts or FOLDERS)

    return _pack(options, source)


def _pack_imagenet(options: argparse.Namespace) -> int:
    _check_folder(options)

    with importing("what packing needs"):
        from data.packing.claim import check_kind
        from data.sources.ilsvrc import find_files, imagenet

    def source() -> Source:
        files = find_files(
            options.folder,
            train_tar=options.train_tar,
            val_tar=options.val_tar,
            devkit=options.devkit,
            val_labels=options.val_labels,
        )
        # Reading the headers takes minutes: nothing of that for a folder that will be refused.
        check_kind(options.out, "imagenet")
        print(f"train from {files.train}, val from {files.val}", flush=True)
        return imagenet(files, options.out)

    return _pack(options, source)


def _pack_imagefolder(options: argparse.Namespace) -> int:
    _check_folder(options)

    with importing("what packing needs"):
        from data.sources.image_folder import imagefolder

    def source() -> Source:
        return imagefolder(options.folder, options.val_fraction, leave_out=options.leave_out)

    return _pack(options, source)


def _pack_huggingface(options: argparse.Namespace) -> int:
    _check_folder(options)

    with importing("what packing needs"):
        from data.sources.huggingface import huggingface

    def source() -> Source:
        return huggingface(
            options.folder,
            options.out,
            image_column=options.image_column,
            label_column=options.label_column,
            config=options.config,
        )

    return _pack(options, source)


def _pack_torchvision(options: argparse.Namespace) -> int:
    with importing("PyTorch"):
        from data.sources.torchvision_sets import torchvision_set

    return _pack(options, lambda: torchvision_set(options.name, options.root))


def _pack(options: argparse.Namespace, source: Callable[[], Source]) -> int:
    with importing("what packing needs"):
        from data.files import explained
        from data.packing.contact_sheet import SHEET_NAME, draw_contact_sheet
        from data.packing.encoding import AS_IT_IS, Encoding
        from data.packing.pack import pack

    # Before the source is looked through, which may take minutes.
    encoding = AS_IT_IS
    if "max_side" in options:
        encoding = Encoding(options.max_side, options.quality, options.captions, options.background)
    with explained(options.out):
        images = source()
        manifests = pack(
            images,
            options.out,
            shard_samples=options.shard_samples,
            seed=options.seed,
            encoding=encoding,
            workers=options.workers,
        )
        for split, manifest in manifests.items():
            if not (options.out / split / SHEET_NAME).exists():
                draw_contact_sheet(options.out / split, manifest)
    _show({options.out / split: manifest for split, manifest in manifests.items()})
    _say([*images.notes, *images.left_out])
    return 0


def _check_folder(options: argparse.Namespace) -> None:
    """Before what decodes images is imported."""
    from launcher.errors import UsageError

    folder = getattr(options, "folder", None)
    if folder is not None and not folder.exists():
        raise UsageError(f"there is no folder {folder}")


def _index(options: argparse.Namespace) -> int:
    _check_folder(options)

    with importing("what packing needs"):
        from data.files import explained
        from data.packing.adopt import index_shards
        from data.packing.contact_sheet import draw_contact_sheet
        from data.sources.left_out import Collector

    left_out = Collector()
    with explained(options.folder):
        manifest = index_shards(
            options.folder,
            label_from=options.label_from,
            leave_out=options.leave_out,
            left_out=left_out,
        )
        draw_contact_sheet(options.folder, manifest)
    _show({options.folder: manifest})
    _say(left_out.listed())
    return 0


def _pieces(options: argparse.Namespace) -> int:
    from data.files import explained
    from data.packing.pieces import add_pieces
    from data.shards.doctor import find_splits
    from data.shards.manifest import load_manifest

    with explained(options.folder):
        for folder in find_splits(options.folder):
            pieces = add_pieces(folder, workers=options.workers)
            shards = len(load_manifest(folder).shards)
            print(f"{folder}: {shards:,} shards, {pieces:,} pieces")
    return 0


def _say(lines: Sequence[object]) -> None:
    for line in lines:
        print(f"note: {line}")


def _show(packed: dict[Path, Manifest]) -> None:
    """Print what was packed as a table, then where its pictures are."""
    from rich.console import Console
    from rich.table import Table

    from data.packing.contact_sheet import SHEET_NAME
    from data.packing.summary import summarise

    table = Table()
    for name in ("split", "samples", "classes", "shards", "MB", "smallest class", "largest class"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for folder, manifest in packed.items():
        summary = summarise(folder, manifest)
        table.add_row(
            summary.split,
            f"{summary.samples:,}",
            f"{summary.classes:,}",
            f"{summary.shards:,}",
            f"{summary.bytes / 1e6:,.1f}",
            *(
                f"{count:,} ({name.split(',')[0]})"
                for name, count in (summary.smallest, summary.largest)
            ),
        )
    console = Console(highlight=False, markup=False)
    console.print(table)
    for folder in packed:
        # soft_wrap: a path broken over two lines cannot be copied.
        console.print(f"shards in {folder}, a look at them: {folder / SHEET_NAME}", soft_wrap=True)
