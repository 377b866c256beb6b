"""Which parquet files of a downloaded data set are which split of which configuration."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError

# In the order of preference; a test set of the hub rarely has labels.
_VAL_NAMES = ("validation", "val", "valid", "test")


@dataclass(frozen=True)
class HubFiles:
    """The files of train and, if there is one, val; and what is to be said of the others."""

    splits: dict[str, list[Path]]
    notes: list[str]


def find_files(folder: Path, config: str | None) -> HubFiles:
    """Find the files of the configuration `config`, or of the only one there is.

    A configuration is a folder of files such as `train-00000-of-00001.parquet` or of folders such
    as `train`. Raises DataError where there is no training split, or several and none is chosen.
    """
    configs = _by_config(folder)
    trained = [name for name, splits in configs.items() if "train" in splits]
    if not trained:
        raise DataError(
            f"{folder} holds no training split (train-*.parquet or train/*.parquet); name the "
            "folder that a data set of the Hugging Face hub was downloaded to"
        )
    if config is None and len(trained) > 1:
        raise DataError(
            f"{folder} holds {len(trained)} configurations ({', '.join(trained)}), whose samples "
            "and classes may differ; choose one with --config"
        )
    name = trained[0] if config is None else config
    if name not in trained:
        raise DataError(
            f"{folder} holds no configuration {config!r} with a training split; "
            f"there is {', '.join(trained)}"
        )
    splits = configs.pop(name)
    val = next((split for split in _VAL_NAMES if split in splits), None)
    chosen = {"train": splits["train"]} | ({} if val is None else {"val": splits[val]})
    notes = [] if val in (None, *_VAL_NAMES[:3]) else [f"val is the split {val}"]
    if val is None:
        notes.append("no val split: there is none called validation, val, valid or test")
    notes += [
        f"left out the split {split} of {len(files)} files"
        for split, files in splits.items()
        if split not in ("train", val)
    ]
    return HubFiles(chosen, notes + [f"left out the configuration {other}" for other in configs])


def _by_config(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """All parquet files by configuration, which is a path from `folder` on, and split."""
    configs: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.rglob("*.parquet")):
        place = path.relative_to(folder)
        if any(part.startswith(".") for part in place.parts):
            continue
        named, dash, _ = path.stem.partition("-")
        split = named if dash else path.parent.name
        # Where the files are in folder itself, that may be the split: `train/0000.parquet`.
        has_folder = path.parent.name == split and path.parent != folder
        above = place.parent.parent if has_folder else place.parent
        configs[above.as_posix()][split].append(path)
    return configs
