"""`scl train | eval | report | pack | recipe`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.arguments import add_recipe_options
from launcher.terminal import say

if TYPE_CHECKING:
    from data.manifest import Manifest
    from data.sources import Source

_EXAMPLES = """\
examples:
  scl pack digits --out runs/data/digits
  scl train --recipe recipes/digits_scl.yaml
  scl train --recipe recipes/digits_scl.yaml --set method.lam=0.2 --set run_dir=runs/lam0.2
  scl eval runs/digits_scl
  scl recipe                       every key of a recipe, its default and what it means

On several machines: deepspeed --hostfile HOSTS --no_local_rank launcher/train.py --recipe FILE
Under Slurm:         sbatch slurm/resnet50_scl.sh
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand. Exit codes: 0 done, 2 usage, 1 failed, 128 + n stopped by signal n."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    options = parser().parse_args(arguments)
    # After parsing: --help must not wait for torch.
    from data.errors import DataError
    from launcher.checkpoint import CheckpointError
    from launcher.errors import RunError, UsageError
    from launcher.results import ReportError

    try:
        return options.command(options)
    except (UsageError, DataError, CheckpointError, ReportError) as error:
        say(f"error: {error}")
        return 2
    except RunError as error:
        say(f"error: {error}")
        return 1


def _train(options: argparse.Namespace) -> int:
    from launcher import report
    from launcher.cluster import find_world
    from launcher.finish import is_finished
    from launcher.preflight import find_start, open_inputs
    from launcher.recipe import load_recipe
    from launcher.spawn import train_on_ranks
    from launcher.train import main as rank_main

    overrides = list(options.overrides)
    if options.ranks is not None:
        overrides.append(f"engine.ranks={options.ranks}")
    recipe = load_recipe(options.recipe, overrides)
    passed_on = ["--recipe", str(options.recipe)]
    for override in overrides:
        passed_on += ["--set", override]
    if find_world().source != "single process":
        return rank_main(passed_on)
    inputs = open_inputs(recipe, recipe.engine.ranks)
    start = find_start(recipe, inputs.manifest)
    steps = inputs.plan(recipe, recipe.engine.ranks, 0).steps_per_epoch * recipe.optim.epochs
    if start is not None and start.step >= steps and is_finished(recipe.folder):
        say(
            f"{recipe.folder} is finished; choose another folder with --set run_dir=… to train "
            "again"
        )
        report.show(recipe.folder)
        return 0
    if recipe.engine.ranks == 1:
        return rank_main(passed_on)
    return train_on_ranks(recipe.engine.ranks, passed_on)


def _eval(options: argparse.Namespace) -> int:
    from launcher.evaluate import evaluate_run

    for key, value in evaluate_run(options.run, options.split, options.data).items():
        print(f"{key:<12} {value:.6g}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from launcher import picture, report

    print(picture.draw(options.run))
    report.show(options.run)
    return 0


def _recipe(options: argparse.Namespace) -> int:
    from launcher.recipe import describe

    print(describe())
    return 0


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


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scl",
        description="Sparse Connectivity Learning: networks that choose their connections.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_report(commands)
    _add_recipe(commands)
    _add_pack(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, run: Callable, summary: str, more: str = ""
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "train a recipe, on as many ranks of this machine as asked",
        "Run again, the same command continues from the newest checkpoint.",
    )
    add_recipe_options(parser)
    parser.add_argument("--ranks", type=int, help="short for --set engine.ranks=N")


def _add_eval(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "eval", _eval, "evaluate the written model of a run")
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/digits_scl")
    parser.add_argument("--split", default="val", help="split to evaluate on (default: val)")
    parser.add_argument("--data", type=Path, help="shards to use instead of the recipe's")


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "report", _report, "draw the picture of a run, show its table")
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/digits_scl")


def _add_recipe(commands: argparse._SubParsersAction) -> None:
    _command(commands, "recipe", _recipe, "list every key of a recipe with default and meaning")


def _add_pack(commands: argparse._SubParsersAction) -> None:
    pack = commands.add_parser("pack", help="pack images into WebDataset shards with a manifest")
    sources = pack.add_subparsers(required=True, metavar="SOURCE")
    more = "Killed and run again, it goes on where it was; done, it leaves everything as it is."
    parser = _command(
        sources, "digits", _pack_digits, "pack scikit-learn's 1,797 digits (no download)", more
    )
    _add_packing_options(parser)
    parser = _command(
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
    parser = _command(
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
    parser = _command(
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


if __name__ == "__main__":
    sys.exit(main())
