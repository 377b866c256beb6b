"""What a folder of shards contains: counts, classes, image statistics and checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tqdm import tqdm

from data.errors import DataError
from data.files import atomic_file, explained, sha256_of

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npz"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardInfo(_Model):
    """One tar file: its name inside the folder, samples, size in bytes and SHA-256."""

    name: str
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str


class ImageStats(_Model):
    """Per-channel mean and standard deviation of the pixels, scaled to [0, 1].

    Every image weighs the same, whatever its size; `measured_on` images were read.
    """

    channels: Literal[1, 3]
    mean: list[float]
    std: list[float]
    measured_on: int

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> ImageStats:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need {self.channels} values each")
        return self


class Manifest(_Model):
    """The contents of one split: a folder of shards with an index.

    `classes` has one per label, of ImageNet the WordNet ids; where these are ids, `class_names` has
    what people call them: "tench, Tinca tinca".
    """

    format_version: Literal[1] = 1
    dataset: str
    split: str
    samples: int
    classes: list[str]
    class_names: list[str] | None = None
    image: ImageStats
    shards: list[ShardInfo]
    index_sha256: str
    source: dict[str, Any]

    @model_validator(mode="after")
    def _one_name_per_class(self) -> Manifest:
        if self.class_names is not None and len(self.class_names) != len(self.classes):
            raise ValueError(f"class_names needs {len(self.classes)} names, one per class")
        return self

    @property
    def names(self) -> list[str]:
        """The classes as people call them."""
        return self.class_names or self.classes

    def as_json(self) -> dict[str, Any]:
        """Return what stands in the file; a field that came later only where it is used."""
        return self.model_dump(exclude={"class_names"} if self.class_names is None else None)

    def fingerprint(self) -> str:
        """Return the hex SHA-256 of the canonical JSON: equal means the same data."""
        canonical = json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_manifest(folder: Path) -> Manifest:
    """Read `folder/manifest.json`.

    Raises DataError where there is no such folder, no manifest in it, or one that cannot be
    understood.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; pack a data set there with `scl pack`")
    if not path.is_file():
        fix = (
            f"index its shards with `scl pack index {folder}`"
            if any(folder.glob("*.tar"))
            else "pack a data set there with `scl pack` (an interrupted packing goes on by itself)"
        )
        raise DataError(f"{folder} has no {MANIFEST_NAME}; {fix}")
    try:
        with explained(path):
            return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path} is not a valid manifest ({where}: {first['msg']}); "
            f"rebuild it with `scl pack index {folder}`"
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json` atomically."""
    with atomic_file(folder / MANIFEST_NAME) as stream:
        stream.write(json.dumps(manifest.as_json(), indent=1, ensure_ascii=False).encode() + b"\n")


def verify_shards(folder: Path, manifest: Manifest) -> None:
    """Check, without reading the shards, that they are those the manifest describes.

    Looks at the presence and size of every shard, the sum of samples, and the index. Raises
    DataError with the first thing that disagrees and the number of others.
    """
    with explained(folder):
        problems = _disagreements(folder, manifest)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(
            f"{folder} does not match its manifest: {problems[0]}{more}; "
            "restore the files, or pack or index the folder again"
        )


def _disagreements(folder: Path, manifest: Manifest) -> list[str]:
    problems = [p for shard in manifest.shards if (p := _shard_problem(folder, shard))]
    total = sum(shard.samples for shard in manifest.shards)
    if total != manifest.samples:
        problems.append(f"its shards hold {total} samples but it claims {manifest.samples}")
    index = folder / INDEX_NAME
    if not index.is_file():
        problems.append(f"{INDEX_NAME} is missing")
    elif sha256_of(index) != manifest.index_sha256:
        problems.append(f"{INDEX_NAME} is not the one the manifest was written with")
    return problems


def _shard_problem(folder: Path, shard: ShardInfo) -> str | None:
    try:
        size = (folder / shard.name).stat().st_size
    except FileNotFoundError:
        return f"{shard.name} is missing"
    if size != shard.bytes:
        return f"{shard.name} has {size} bytes instead of {shard.bytes}"
    return None


def verify_checksums(folder: Path, manifest: Manifest, progress: bool = True) -> list[str]:
    """Read every shard and compare its SHA-256; return the problems found, one sentence each."""
    problems = []
    bar = tqdm(
        total=sum(shard.bytes for shard in manifest.shards),
        unit="B",
        unit_scale=True,
        desc=f"checking {folder.name}",
        disable=not progress,
    )
    with bar:
        for shard in manifest.shards:
            problem = _shard_problem(folder, shard)
            if problem is None and sha256_of(folder / shard.name) != shard.sha256:
                problem = f"{shard.name} has changed since it was packed (its SHA-256 differs)"
            if problem is not None:
                problems.append(problem)
            bar.update(shard.bytes)
    index = folder / INDEX_NAME
    if not index.is_file():
        problems.append(f"{INDEX_NAME} is missing")
    elif sha256_of(index) != manifest.index_sha256:
        problems.append(f"{INDEX_NAME} has changed (its SHA-256 differs)")
    return problems
