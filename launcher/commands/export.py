"""`scl export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launcher.commands import SUMMARIES, Commands, add_command

_MORE = """\
formats, several with commas between them:
  safetensors  the state_dict, for the unmodified model (timm's load_checkpoint)
  state_dict   the same as PyTorch's own file (torch.load with weights_only=True)
  onnx         the graph, for onnxruntime and its kin; any batch size
  torch        the graph as .pt2 (torch.export.load)
  native       C source, library and weights for the CPU: live weights alone are computed
  csv          connections, density and MACs of each layer
  compact      positions and values of what is not zero: the smallest file of unshared weights
  ham, sham    few values a layer as Huffman codewords, by --share; all elements, or the live
  2:4          for sparse tensor cores: verified, or made so by --convert-2to4

Each is read back and compared before the folder appears; of a run that is not finished, the newest
checkpoint is taken. What each is for: docs/export.md.

example:
  scl export runs/digits_scl --format onnx,compact --out runs/digits_export"""


def add(commands: Commands) -> None:
    parser = add_command(commands, "export", _export, SUMMARIES["export"], _MORE)
    add_source_options(parser, "SOURCE")
    parser.add_argument("--format", required=True, metavar="FORMAT[,FORMAT…]", help="see below")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new")
    parser.add_argument(
        "--remove-dead",
        action="store_true",
        help="graphs (onnx, torch, native): without features that are dead",
    )
    parser.add_argument(
        "--fold-bn",
        action="store_true",
        help="onnx, torch: batch norm in the layer before it (native always)",
    )
    parser.add_argument(
        "--values",
        choices=["float32", "float16", "int8"],
        default="float32",
        help="compact: what weights are rounded to (default: float32, not at all)",
    )
    parser.add_argument(
        "--share",
        metavar="KIND:N",
        help="ham, sham: N values for each layer, by kmeans:N, or unbiased at random by pq:N",
    )
    parser.add_argument(
        "--convert-2to4",
        action="store_true",
        help="2:4: drop the smaller two of four weights where the hardware would profit",
    )
    parser.add_argument("--data", help="shards to measure on instead of the recipe's data.path")


def add_source_options(parser: argparse.ArgumentParser, name: str) -> None:
    """What is read, and what it does not say of itself."""
    parser.add_argument(
        "source",
        type=Path,
        metavar=name,
        help="folder of a run or an export, a checkpoint, or a file (.safetensors, .sclc, .sham …)",
    )
    file = parser.add_argument_group("of a file that does not say it")
    file.add_argument("--model", metavar="NAME", help="its model, as in a recipe's model.name")
    file.add_argument(
        "--kwarg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what the model is built with, as in a recipe's model.kwargs",
    )
    file.add_argument("--image-size", type=int, metavar="PIXELS", help="of its images")


def described(options: argparse.Namespace) -> Any:
    """The options of `add_source_options` as the rooms take them. Raises UsageError."""
    import yaml

    from launcher.errors import UsageError
    from launcher.export.source import Described

    kwargs = {}
    for text in options.kwarg:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"--kwarg {text}: should be KEY=VALUE, such as width=64")
        kwargs[key] = yaml.safe_load(value)
    if options.image_size is not None and options.image_size < 1:
        raise UsageError(f"--image-size is {options.image_size}; it must be at least 1")
    return Described(options.model, kwargs or None, options.image_size)


def _export(options: argparse.Namespace) -> int:
    from launcher.export.asked import Options, check_options, check_source

    asked = Options(
        source=options.source,
        formats=tuple(dict.fromkeys(options.format.split(","))),
        out=options.out,
        remove_dead=options.remove_dead,
        fold_bn=options.fold_bn,
        values=options.values,
        share=options.share,
        convert=options.convert_2to4,
        data=options.data,
    )
    check_options(asked)
    check_source(asked.source)

    # Not before all is known to be there: they import torch, which takes seconds.
    from launcher.terminal import importing, say

    with importing("PyTorch"):
        from launcher.export.show import show
        from launcher.export.write import export

    show(export(asked, described(options), say), options.out)
    return 0
