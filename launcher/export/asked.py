"""What an export was asked for, and whether that can be."""

from __future__ import annotations

import difflib
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UsageError
from sclcore.kernels.compiler import find_compiler

FORMATS = (
    *("safetensors", "state_dict", "onnx", "torch", "native", "csv", "compact", "ham", "sham"),
    "2:4",
)
GRAPHS = ("onnx", "torch", "native")
CODED = ("ham", "sham")
SHARINGS = ("kmeans", "pq")
_MOST_SHARED = 65_536
ONNX = ("onnx", "onnxscript", "onnxruntime")
WHAT = "give the folder of a run or of an export, a checkpoint, or a model.safetensors"


@dataclass(frozen=True)
class Options:
    """What was asked for; see `scl export --help`."""

    source: Path
    formats: tuple[str, ...]
    out: Path
    remove_dead: bool = False
    fold_bn: bool = False
    values: str = "float32"
    share: str | None = None
    convert: bool = False
    data: str | None = None


def check_options(options: Options) -> None:
    """Raises UsageError where the options contradict each other or ask for what is not there."""
    for name in options.formats:
        if name not in FORMATS:
            close = difflib.get_close_matches(name, FORMATS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(FORMATS)}"
            raise UsageError(f"--format: there is no format {name!r}; {hint}")
    if "onnx" in options.formats:
        missing = [name for name in ONNX if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(
                f"--format onnx needs {', '.join(missing)}: pip install 'scl-train[onnx]'"
            )
    if "native" in options.formats:
        _check_compiler()
    for option, given, needed in (
        ("--remove-dead", options.remove_dead, GRAPHS),
        ("--fold-bn", options.fold_bn, GRAPHS),
        (f"--values {options.values}", options.values != "float32", ("compact",)),
        (f"--share {options.share}", options.share is not None, CODED),
        ("--convert-2to4", options.convert, ("2:4",)),
    ):
        if given and not set(needed) & set(options.formats):
            raise UsageError(
                f"{option} changes {_listed(needed)} alone (the others hold the tensors that "
                f"the unmodified model loads): add --format {needed[0]}"
            )
    if options.share is not None:
        read_sharing(options.share)
    out = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists: choose another folder, or remove it first")


def _check_compiler() -> None:
    try:
        find_compiler()
    except OSError as error:
        raise UsageError(f"--format native: {error}; install gcc or clang") from error
    if shutil.which("make") is None:
        raise UsageError("--format native: there is no make here; install it")


def _listed(names: tuple[str, ...]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def read_sharing(text: str) -> tuple[str, int]:
    """(kind, how many values) of --share. Raises UsageError."""
    kind, _, number = text.partition(":")
    if kind not in SHARINGS or not number.isdecimal() or not 2 <= int(number) <= _MOST_SHARED:
        raise UsageError(
            f"--share {text}: should be kmeans:N or pq:N with N from 2 to {_MOST_SHARED:,} values "
            "for each layer, such as kmeans:32"
        )
    return kind, int(number)


def check_source(path: Path) -> None:
    """Raises UsageError if there is nothing at `path`."""
    if not path.exists():
        raise UsageError(f"there is no {path}: {WHAT}")
