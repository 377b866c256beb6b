"""The samples of one split, by id: read, decode, transform, replace what is corrupt."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data.augmentation.mixing import pair_parameters
from data.augmentation.transforms import Transform, eval_transform, sample_seed, train_transform
from data.config import DataConfig
from data.errors import DataError
from data.images.decode import CorruptImage
from data.shards.class_order import is_sorted_by_class
from data.shards.index import SampleIndex, key_at
from data.shards.manifest import INDEX_NAME
from data.storage.ahead import Stretch
from data.storage.open import open_store
from data.storage.reader import ShardReader
from data.storage.store import Store
from data.stream import plan
from data.stream.batches import channels_first, empty_images

# More corrupt neighbours than this in a row are a broken shard, not a broken sample.
MAX_NEIGHBOURS = 32
# Evaluation reads shards in order; so many of them are fetched before it reads the first.
STAGE_SHARDS = 4
_log = logging.getLogger("data")

TrainKey = tuple[int, int]


class ShardDataset(Dataset[dict[str, Any]]):
    """Map-style samples: `dataset[epoch, id]` augmented, `dataset[id]` as in evaluation.

    An item holds image (uint8 [C, H, W]), label, id and corrupt (0 or 1; then image and label
    are those of the next sample of its shard that decodes). Augmentation is a function of
    (seed, epoch, id). Torch's loader asks for whole batches, which are written in place.

    `corrupt` has the reasons, by sample id, for the samples that `note_corrupt` was told of.
    """

    def __init__(self, store: Store, config: DataConfig, seed: int = 0) -> None:
        self.store = store
        self.manifest = store.manifest
        self.seed = seed
        self.corrupt: dict[int, str] = {}
        self._index = SampleIndex.load(store.folder / INDEX_NAME)
        self._reader = ShardReader(store.places)
        self._config = config
        self._epochs = 1
        self._transforms: dict[tuple[str, int], Transform] = {}
        if len(self._index) != self.manifest.samples:
            raise DataError(
                f"the index of {store.name} has {len(self._index)} samples but its manifest "
                f"{self.manifest.samples}; index or pack the folder again"
            )

    def __len__(self) -> int:
        return len(self._index)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples per shard, as `BatchPlan` wants them."""
        return tuple(shard.samples for shard in self.manifest.shards)

    @property
    def image_bytes(self) -> int:
        """Bytes of the largest image of a batch."""
        return self._config.image_size**2 * self.manifest.image.channels

    def with_seed(self, seed: int, epochs: int = 1) -> ShardDataset:
        """Return a view that augments by `seed` and shares the record of corrupt samples.

        `epochs` is the length of the run, from which progressive sizes follow.
        """
        view = copy.copy(self)
        view.seed = seed
        view._epochs = epochs
        view._transforms = {}
        view._reader = ShardReader(self.store.places)
        return view

    def __getitem__(self, key: TrainKey | int) -> dict[str, Any]:
        """Return one sample; raises as `__getitems__` does."""
        batch, _ = self._load([key])
        item = {name: int(batch[name][0]) for name in ("label", "id", "corrupt")}
        return {"image": batch["image"][0], **item}

    def __getitems__(self, keys: Sequence[TrainKey | int]) -> dict[str, torch.Tensor]:
        """Return a batch: image uint8 [B, C, H, W] in channels-last memory, label, id, corrupt.

        Training keys are all of one epoch. With mixing in the recipe, there is also what
        `data.augmentation.mixing.mix` needs. Raises DataError where a shard cannot be read or too
        many neighbours are corrupt.
        """
        return self.load(keys)[0]

    def load(
        self, keys: Sequence[TrainKey | int], room: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """Return a batch as `__getitems__` does, and whether its images lie in `room`."""
        batch, is_used = self._load(keys, room)
        if isinstance(keys[0], tuple) and self._config.mixing:
            ids, size = batch["id"].numpy(), batch["image"].shape[-1]
            batch |= pair_parameters(self._config, ids, size, seed=self.seed, epoch=keys[0][0])
        return batch, is_used

    def _load(
        self, keys: Sequence[TrainKey | int], room: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], bool]:
        transform, size = self._transform(keys[0])
        images, is_used = empty_images(len(keys), size, self.manifest.image.channels, room)
        used = np.array(
            [self._write(key, transform, images[i]) for i, key in enumerate(keys)], np.int64
        )
        ids = np.array([key[1] if isinstance(key, tuple) else key for key in keys], np.int64)
        columns = {
            "label": self._index.label[used].astype(np.int64),
            "id": ids,
            "corrupt": (used != ids).astype(np.int64),
        }
        image = channels_first(images)
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        return {"image": image} | tensors, is_used

    def _transform(self, key: TrainKey | int) -> tuple[Transform, int]:
        """What the samples of a batch go through, and their size afterwards."""
        if isinstance(key, tuple):
            kind, size = "train", self._config.training_size(key[0], self._epochs)
        else:
            kind, size = "eval", self._config.image_size
        if (kind, size) not in self._transforms:
            self._transforms[kind, size] = (
                train_transform(self._config, size, self.manifest.image)
                if kind == "train"
                else eval_transform(self._config, self.manifest.image)
            )
        return self._transforms[kind, size], size

    def _write(self, key: TrainKey | int, transform: Transform, out: torch.Tensor) -> int:
        """Put one sample into its place of a batch; returns the id of the one that decoded."""
        sample = key[1] if isinstance(key, tuple) else key
        seed = sample_seed(self.seed, *key) if isinstance(key, tuple) else 0
        problem = self._try(sample, transform, seed, out)
        if problem is None:
            return sample
        _, *others = neighbours = self._neighbours(sample)
        for candidate in others:
            if self._try(candidate, transform, seed, out) is None:
                return candidate
        shard, name = self.locate(sample)
        raise DataError(
            f"{len(neighbours)} samples in a row cannot be decoded, from {name} in "
            f"{self.store.name}/{shard} on ({problem}); restore the shard (`scl doctor` "
            "checks them all)"
        )

    def _neighbours(self, sample: int) -> list[int]:
        """The sample and those after it, in its shard alone: others may not have been fetched."""
        number = self._index.shard[sample]
        first = int(np.searchsorted(self._index.shard, number, side="left"))
        size = int(np.searchsorted(self._index.shard, number, side="right")) - first
        return [first + (sample - first + k) % size for k in range(min(MAX_NEIGHBOURS, size))]

    def _try(self, sample: int, transform: Transform, seed: int, out: torch.Tensor) -> str | None:
        """Write the sample to `out`, or return why it cannot be had."""
        size = int(self._index.size[sample])
        shard, offset = int(self._index.shard[sample]), int(self._index.offset[sample])
        content = self._reader.read(shard, offset, size)
        if len(content) < size:
            return f"the shard ends after {len(content)} of its {size} bytes"
        try:
            transform(content, seed, out)
        except CorruptImage as error:
            return str(error)
        return None

    def __getstate__(self) -> dict[str, Any]:
        # Each worker builds its own: they hold buffers, and functions that cannot be sent.
        return self.__dict__ | {"_transforms": {}}

    def warn_if_sorted(self) -> None:
        """Log a warning if the order of training cannot mix the classes of these shards."""
        # A set of one window is permuted as a whole, however it lies.
        if len(self) > plan.WINDOW and is_sorted_by_class(self._index.label):
            _log.warning(
                "%s is sorted by class, so a batch sees few classes at a time, a rank's part of it "
                "fewer still, and training suffers; pack it again with `scl pack`, which shuffles",
                self.store.name,
            )

    def stages(self, ids: np.ndarray) -> range:
        """Return the groups of shards that ascending `ids` are read from, see `Ahead`."""
        first, last = self._index.shard[ids[[0, -1]]].tolist()
        return range(first // STAGE_SHARDS, last // STAGE_SHARDS + 1)

    def stage_stretches(self, stage: int) -> list[Stretch]:
        """Return the shards of one such group."""
        first = stage * STAGE_SHARDS
        shards = self.manifest.shards[first : first + STAGE_SHARDS]
        return [Stretch(first + k, 0, shard.bytes) for k, shard in enumerate(shards)]

    def stretches(self, ids: np.ndarray) -> list[Stretch]:
        """Return what is read of each shard for the samples `ids`, ascending."""
        index = self._index
        shards, first = np.unique(index.shard[ids], return_index=True)
        # By offset: a link in a tar leads back to what lies before it.
        begin = np.minimum.reduceat(index.offset[ids], first)
        end = np.maximum.reduceat(index.offset[ids] + index.size[ids], first)
        return [
            Stretch(*row) for row in zip(shards.tolist(), begin.tolist(), end.tolist(), strict=True)
        ]

    def locate(self, sample: int) -> tuple[str, str]:
        """Return the shard's name and the key of a sample, for messages."""
        shard = self.manifest.shards[int(self._index.shard[sample])].name
        # A message about damage must not fail because of it.
        try:
            offset = int(self._index.offset[sample])
            path, first = self.store.places.find(int(self._index.shard[sample]), offset)
            return shard, key_at(path, offset - first)
        except (DataError, OSError):
            return shard, f"sample {sample}"

    def note_corrupt(self, sample: int) -> None:
        """Log a corrupt sample with shard, key and reason, and record it; once per sample."""
        if sample in self.corrupt:
            return
        transform, size = self._transform(sample)
        out = empty_images(1, size, self.manifest.image.channels)[0][0]
        reason = self._try(sample, transform, 0, out) or "it decodes now, but did not before"
        self.corrupt[sample] = reason
        shard, key = self.locate(sample)
        _log.warning("corrupt sample %s in %s replaced by a neighbour: %s", key, shard, reason)

    def corrupt_per_shard(self) -> dict[str, int]:
        """Return how many corrupt samples this process has noted, by shard name."""
        return dict(Counter(self.locate(sample)[0] for sample in sorted(self.corrupt)))


def open_split(config: DataConfig, split: str) -> ShardDataset:
    """Open one split of `config.path` after checking its shards against the manifest.

    Raises DataError where nothing is packed, the shards are not those of the manifest, or a place
    elsewhere cannot be reached.
    """
    return ShardDataset(open_store(config, split, plan.WINDOW), config)
