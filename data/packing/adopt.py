"""Taking over shards that others have written: counting them, index and manifest in place."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from data.errors import DataError
from data.files import sha256_of
from data.packing.stats import measure
from data.shards.classes import numbered_classes
from data.shards.index import SampleIndex
from data.shards.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    load_manifest,
    write_manifest,
)
from data.shards.pieces import ShardPieces, cuts, read_pieces, write_pieces
from data.shards.scan import ShardRows, scan_shard
from data.sources.left_out import DEFAULT_SHARE, Collector, check_share


def index_shards(
    folder: Path,
    *,
    classes: list[str] | None = None,
    dataset: str | None = None,
    label_from: str | None = None,
    leave_out: float = DEFAULT_SHARE,
    left_out: Collector | None = None,
    progress: bool = True,
) -> Manifest:
    """Build index and manifest in place for the `*.tar` files others have put in `folder`.

    The folder's name is taken for the split, its parent's for the data set. A folder beside one
    called train takes over the image statistics of that, if it is indexed already. `label_from`
    is `json:FIELD` where the label stands in `key.json` instead of `key.cls`. What is in no sample
    is noted in `left_out`, and refused where it is more than the share `leave_out`. Raises
    DataError where there are no shards or one is not in the webdataset layout (`key.jpg|png|webp`
    and `key.cls`), for a `label_from` of another form, and for labels beyond `classes`.
    """
    label_field = _label_field(label_from)
    left_out = Collector() if left_out is None else left_out
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; name the one that holds the .tar files")
    folder = folder.resolve()
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} holds no .tar files; name the folder that does")
    infos: list[ShardInfo] = []
    rows: list[ShardRows] = []
    pieces: list[ShardPieces] = []
    for path in tqdm(paths, unit="shard", desc="indexing", disable=not progress):
        rows.append(scan_shard(path, label_field))
        for why, name in rows[-1].left_out:
            left_out.add(why, f"{name} in {path.name}", images=1)
        size = path.stat().st_size
        pieces.append(read_pieces(path, cuts(rows[-1].offset, size)))
        infos.append(
            ShardInfo(
                name=path.name,
                samples=len(rows[-1].label),
                bytes=size,
                sha256=pieces[-1].shard_sha256,
            )
        )
    index = SampleIndex.from_rows(rows)
    check_share(str(folder), len(index), left_out.listed(), leave_out)
    train = _train_beside(folder)
    names, people = _class_names(folder, index, classes, train)
    index.save(folder / INDEX_NAME)
    write_pieces(folder, pieces)
    manifest = Manifest(
        dataset=dataset or folder.parent.name,
        split=folder.name,
        samples=len(index),
        classes=names,
        class_names=people,
        image=measure(folder, [i.name for i in infos], index) if train is None else train.image,
        shards=infos,
        index_sha256=sha256_of(folder / INDEX_NAME),
        source={"kind": "indexed"} | ({"label_from": label_from} if label_from else {}),
    )
    write_manifest(folder, manifest)
    return manifest


def _label_field(label_from: str | None) -> str | None:
    if label_from is None:
        return None
    kind, _, name = label_from.partition(":")
    if kind != "json" or not name:
        raise DataError(f"label_from is {label_from!r}; write json: and a field, as in json:label")
    return name


def _class_names(
    folder: Path, index: SampleIndex, classes: list[str] | None, train: Manifest | None
) -> tuple[list[str], list[str] | None]:
    """The classes, and what people call them where these are ids."""
    needed = int(index.label.max()) + 1
    people = None
    if classes is None:
        if train is None:
            return numbered_classes(needed, str(folder)), None
        classes, people = train.classes, train.class_names
    if needed > len(classes):
        source = "train has" if train is not None else "were given"
        raise DataError(
            f"{folder} has labels up to {needed - 1} but only {len(classes)} class names {source}; "
            "give one per label, or index train again if it has changed"
        )
    return classes, people


def _train_beside(folder: Path) -> Manifest | None:
    train = folder.parent / "train"
    if folder == train or not (train / MANIFEST_NAME).exists():
        return None
    return load_manifest(train)
