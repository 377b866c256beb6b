"""`scl checkpoint ls | verify | prune | convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands import SUMMARIES, Commands, add_command, add_group
from launcher.terminal import importing


def add(commands: Commands) -> None:
    """Add the command and its four subcommands."""
    actions = add_group(
        commands,
        "checkpoint",
        SUMMARIES["checkpoint"],
        "example:\n  scl checkpoint ls runs/digits_scl",
        metavar="ACTION",
    )
    _add_ls(actions)
    _add_verify(actions)
    _add_prune(actions)
    _add_convert(actions)


def _add_ls(actions: Commands) -> None:
    parser = add_command(
        actions,
        "ls",
        _ls,
        "list the checkpoints of a run, oldest first",
        "example:\n  scl checkpoint ls runs/digits_scl",
    )
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/digits_scl")


def _add_verify(actions: Commands) -> None:
    parser = add_command(
        actions,
        "verify",
        _verify,
        "read every file and compare its checksum; exit 1 if any differs",
        "example:\n  scl checkpoint verify runs/digits_scl",
    )
    parser.add_argument("path", type=Path, help="folder of a run, or of one checkpoint")


def _add_prune(actions: Commands) -> None:
    parser = add_command(
        actions,
        "prune",
        _prune,
        "delete what retention does not keep, damaged ones, leftovers",
        "example:\n  scl checkpoint prune runs/digits_scl --keep 1 --dry-run",
    )
    parser.add_argument("run", type=Path, help="folder of the run, such as runs/digits_scl")
    parser.add_argument(
        "--keep", type=_positive, help="how many of the newest stay (default: the recipe's)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def _add_convert(actions: Commands) -> None:
    parser = add_command(
        actions,
        "convert",
        _convert,
        "write a checkpoint in another form",
        "model: the sparse network as safetensors, for the unmodified model, without the rest.\n"
        "whole: a checkpoint whose optimizer state is one file, to continue from with\n"
        "       --set checkpoint.resume=OUT; ranks and ZeRO stage are free either way.\n\n"
        "examples:\n"
        "  scl checkpoint convert runs/digits_scl model.safetensors\n"
        "  scl checkpoint convert runs/digits_scl runs/whole --to whole",
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run for its newest one")
    parser.add_argument("out", type=Path, help="file (model) or folder (whole) to write")
    parser.add_argument("--to", choices=["model", "whole"], default="model", help="default: model")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("should be at least 1")
    return number


def _ls(options: argparse.Namespace) -> int:
    from launcher.checkpoints.listing import show

    show(options.run)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from launcher.checkpoints.tools import damaged

    wrong = damaged(options.path)
    for path, problems in wrong.items():
        print(f"{path}: {'; '.join(problems)}" if problems else f"{path}: sound")
    return 1 if any(wrong.values()) else 0


def _prune(options: argparse.Namespace) -> int:
    from launcher.checkpoints.tools import prune

    verb = "would delete" if options.dry_run else "deleted"
    for path, reason, size in prune(options.run, keep=options.keep, dry_run=options.dry_run):
        print(f"{verb} {path} ({size}): {reason}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from launcher.checkpoints.tools import check_conversion

    # Before torch is imported, which takes seconds.
    check_conversion(options.checkpoint, options.out)

    with importing("PyTorch"):
        from launcher.checkpoints.convert import to_model, to_whole

    {"model": to_model, "whole": to_whole}[options.to](options.checkpoint, options.out)
    print(options.out)
    return 0
