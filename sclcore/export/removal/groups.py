"""Numbers that stand for features, in groups that go together or not at all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NONE = -1  # a number that code or a constant holds: no feature


class Groups:
    """Labels 0, 1, 2 … joined to groups, some of which must stay (are frozen), with the reason."""

    def __init__(self) -> None:
        self._parents = np.empty(0, dtype=np.int64)
        self._frozen: dict[int, str] = {}

    def new(self, count: int) -> Tensor:
        """`count` fresh labels, each a group of its own."""
        fresh = np.arange(self.count(), self.count() + count)
        self._parents = np.concatenate([self._parents, fresh])
        return torch.from_numpy(fresh)

    def roots(self, labels: Tensor) -> Tensor:
        """The number that all labels of one group share, for each of `labels`; -1 stays."""
        parents = torch.from_numpy(self._parents)
        while True:
            above = torch.where(labels < 0, labels, parents[labels.clamp_min(0)])
            if torch.equal(above, labels):
                return labels
            labels = above

    def frozen(self) -> dict[int, str]:
        """The groups that must stay → why."""
        return {int(self.roots(torch.tensor(k))): v for k, v in reversed(self._frozen.items())}

    def count(self) -> int:
        return len(self._parents)

    def join(self, one: Tensor, other: Tensor) -> None:
        """Make one group of each pair of elements; what has no label freezes its partner."""
        one, other = torch.broadcast_tensors(one, other)
        for dim in range(one.ndim):
            if one.stride(dim) == other.stride(dim) == 0:
                one, other = one.narrow(dim, 0, 1), other.narrow(dim, 0, 1)
        one, other = self.roots(one).flatten(), self.roots(other).flatten()
        pairs = torch.unique(torch.stack([one, other], 1)[one != other], dim=0)
        for a, b in pairs.tolist():
            if a < 0 or b < 0:
                self.freeze(torch.tensor([max(a, b)]), "numbers the code holds are beside it")
            else:
                a, b = self._root(a), self._root(b)
                self._parents[max(a, b)] = min(a, b)

    def _root(self, label: int) -> int:
        while (above := int(self._parents[label])) != label:
            label = above
        return label

    def freeze(self, labels: Tensor, reason: str) -> None:
        """These must stay; the first reason counts."""
        for label in torch.unique(self.roots(labels)).tolist():
            if label >= 0:
                self._frozen.setdefault(label, reason)
