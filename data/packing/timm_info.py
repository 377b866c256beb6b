"""The file that timm's `wds/` reader looks for beside shards: files and counts of each split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from data.files import atomic_file
from data.shards.manifest import Manifest

INFO_NAME = "_info.json"
# What timm calls the split that is val here.
_TIMM_NAMES = {"val": "validation"}


def write_timm_info(out: Path, manifests: Mapping[str, Manifest]) -> None:
    """Write `out/_info.json`; the names of the shards in it start at `out`."""
    splits = {}
    for split, manifest in sorted(manifests.items()):
        name = _TIMM_NAMES.get(split, split)
        splits[name] = {
            "name": name,
            "num_samples": manifest.samples,
            "filenames": [f"{split}/{shard.name}" for shard in manifest.shards],
            "shard_lengths": [shard.samples for shard in manifest.shards],
        }
    with atomic_file(out / INFO_NAME) as stream:
        stream.write(json.dumps({"splits": splits}, indent=1).encode() + b"\n")
