"""The samples of one split, by id: read, decode, transform, replace what is corrupt."""

import copy
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from data.config import DataConfig
from data.errors import DataError
from data.images import decode
from data.index import SampleIndex, key_at
from data.manifest import INDEX_NAME, Manifest, load_manifest, verify_shards
from data.reader import ShardReader
from data.transforms import eval_transform, sample_seed, seeded, train_transform

# More corrupt neighbours than this in a row are a broken shard, not a broken sample.
MAX_NEIGHBOURS = 32
_log = logging.getLogger("data")

TrainKey = tuple[int, int]


class ShardDataset(Dataset[dict[str, Any]]):
    """Map-style samples: ``dataset[epoch, id]`` augmented, ``dataset[id]`` as in evaluation.

    An item holds image (uint8 [C, H, W]), label, id and corrupt (0 or 1; then image and label
    are those of the next sample that decodes). Augmentation is a function of (seed, epoch, id).

    Attributes:
        corrupt: reasons by sample id, for the samples ``note_corrupt`` was told of.
    """

    def __init__(self, folder: Path, manifest: Manifest, config: DataConfig, seed: int = 0) -> None:
        self.folder = folder
        self.manifest = manifest
        self.seed = seed
        self.corrupt: dict[int, str] = {}
        self._index = SampleIndex.load(folder / INDEX_NAME)
        self._reader = ShardReader([folder / shard.name for shard in manifest.shards])
        self._train = train_transform(config)
        self._random = config.augment != "none" or config.hflip
        self._eval = eval_transform(config)
        if len(self._index) != manifest.samples:
            raise DataError(
                f"the index of {folder} has {len(self._index)} samples but its manifest "
                f"{manifest.samples}; index or pack the folder again"
            )

    def __len__(self) -> int:
        return len(self._index)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples per shard, as ``BatchPlan`` wants them."""
        return tuple(shard.samples for shard in self.manifest.shards)

    def with_seed(self, seed: int) -> "ShardDataset":
        """Return a view that augments by ``seed`` and shares the record of corrupt samples."""
        view = copy.copy(self)
        view.seed = seed
        view._reader = ShardReader(self._reader.paths)
        return view

    def __getitem__(self, key: TrainKey | int) -> dict[str, Any]:
        """Return one sample.

        Raises:
            DataError: a shard cannot be read, or too many neighbours are corrupt.
        """
        sample = key if isinstance(key, int) else key[1]
        image, used = self._decoded(sample)
        if isinstance(key, int):
            pixels = self._eval(image)
        elif self._random:
            with seeded(sample_seed(self.seed, *key)):
                pixels = self._train(image)
        else:
            pixels = self._train(image)
        label = int(self._index.label[used])
        return {"image": pixels, "label": label, "id": sample, "corrupt": int(used != sample)}

    def _decoded(self, sample: int) -> tuple[Image.Image, int]:
        for step in range(min(MAX_NEIGHBOURS, len(self))):
            candidate = (sample + step) % len(self)
            image = self._try(candidate)
            if isinstance(image, Image.Image):
                return image, candidate
        shard, key = self.locate(sample)
        raise DataError(
            f"{min(MAX_NEIGHBOURS, len(self))} samples in a row cannot be decoded, from {key} in "
            f"{self.folder / shard} on ({self._try(sample)}); restore the shard (`scl doctor` "
            "checks them all)"
        )

    def _try(self, sample: int) -> Image.Image | str:
        """Return the image, or why it cannot be had."""
        size = int(self._index.size[sample])
        shard, offset = int(self._index.shard[sample]), int(self._index.offset[sample])
        content = self._reader.read(shard, offset, size)
        if len(content) < size:
            return f"the shard ends after {len(content)} of its {size} bytes"
        # Pillow raises many kinds for bytes it cannot decode; all mean the same here.
        try:
            return decode(content, self.manifest.image.channels)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def locate(self, sample: int) -> tuple[str, str]:
        """Return the shard's name and the key of a sample, for messages."""
        shard = self.manifest.shards[int(self._index.shard[sample])].name
        # A message about damage must not fail because of it.
        try:
            return shard, key_at(self.folder / shard, int(self._index.offset[sample]))
        except (DataError, OSError):
            return shard, f"sample {sample}"

    def note_corrupt(self, sample: int) -> None:
        """Log a corrupt sample with shard, key and reason, and record it; once per sample."""
        if sample in self.corrupt:
            return
        found = self._try(sample)
        reason = found if isinstance(found, str) else "it decodes now, but did not before"
        self.corrupt[sample] = reason
        shard, key = self.locate(sample)
        _log.warning("corrupt sample %s in %s replaced by a neighbour: %s", key, shard, reason)

    def corrupt_per_shard(self) -> dict[str, int]:
        """Return how many corrupt samples this process has noted, by shard name."""
        return dict(Counter(self.locate(sample)[0] for sample in sorted(self.corrupt)))


def open_split(config: DataConfig, split: str) -> ShardDataset:
    """Open ``config.path/split`` after checking its shards against the manifest.

    Raises:
        DataError: nothing packed there, or the shards are not those of the manifest.
    """
    folder = config.path / split
    manifest = load_manifest(folder)
    verify_shards(folder, manifest)
    return ShardDataset(folder, manifest, config)
