"""Taking over shards that others have written: counting them, index and manifest in place."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from data.errors import DataError
from data.files import sha256_of
from data.packing.stats import measure
from data.shards.index import SampleIndex, ShardRows, scan_shard
from data.shards.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    ImageStats,
    Manifest,
    ShardInfo,
    load_manifest,
    write_manifest,
)


def index_shards(
    folder: Path,
    *,
    classes: list[str] | None = None,
    dataset: str | None = None,
    label_from: str | None = None,
    progress: bool = True,
) -> Manifest:
    """Build index and manifest in place for the `*.tar` files others have put in `folder`.

    The folder's name is taken for the split, its parent's for the data set. A folder beside one
    called train takes over the image statistics of that, if it is indexed already. `label_from`
    is `json:FIELD` where the label stands in `key.json` instead of `key.cls`. Raises
    DataError where there are no shards or one is not in the webdataset layout (`key.jpg|png|webp`
    and `key.cls`), for a `label_from` of another form, and for labels beyond `classes`.
    """
    label_field = _label_field(label_from)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; name the one that holds the .tar files")
    folder = folder.resolve()
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} holds no .tar files; name the folder that does")
    infos: list[ShardInfo] = []
    rows: list[ShardRows] = []
    for path in tqdm(paths, unit="shard", desc="indexing", disable=not progress):
        rows.append(scan_shard(path, label_field))
        infos.append(
            ShardInfo(
                name=path.name,
                samples=len(rows[-1].label),
                bytes=path.stat().st_size,
                sha256=sha256_of(path),
            )
        )
    index = SampleIndex.from_rows(rows)
    names = _class_names(folder, index, classes)
    index.save(folder / INDEX_NAME)
    manifest = Manifest(
        dataset=dataset or folder.parent.name,
        split=folder.name,
        samples=len(index),
        classes=names,
        image=_train_stats(folder) or measure(folder, [i.name for i in infos], index),
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


def _class_names(folder: Path, index: SampleIndex, classes: list[str] | None) -> list[str]:
    needed = int(index.label.max()) + 1
    if classes is None:
        train = folder.parent / "train" / MANIFEST_NAME
        known = load_manifest(train.parent).classes if train.exists() else []
        # A val set need not have a sample of the last class.
        return [str(label) for label in range(max(needed, len(known)))]
    if needed > len(classes):
        raise DataError(
            f"{folder} has labels up to {needed - 1} but only {len(classes)} class names were "
            "given; give one per label"
        )
    return classes


def _train_stats(folder: Path) -> ImageStats | None:
    train = folder.parent / "train"
    if folder == train or not (train / MANIFEST_NAME).exists():
        return None
    return load_manifest(train).image
