"""Projections of a weight tensor onto balls whose corners are sparse.

A tensor is seen as a matrix [groups, elements], whose rows w_j are its output or its input features
(`matrix_of`). The balls of radius η are

    l1      Σ |w| ≤ η                     zeros anywhere
    l2,1    Σ_j ‖w_j‖₂ ≤ η                whole groups
    l1,1    Σ_j ‖w_j‖₁ ≤ η                the ball of l1, and whole groups before others
    l1,∞    Σ_j max |w_j| ≤ η             whole groups; what is left of a group is cut at one height

The first two are the nearest point of the ball. The others are *bi-level*: the norms of the groups
are projected onto the l1 ball of radius η, and then each group onto the ball that is left for it.
That is another point of the boundary, found in linear time after a sort of the norms, with more
groups that are 0. Source: Barlaud and Guyard, "Learning sparse deep neural networks using efficient
structured projections", ICPR 2020 (hal-02556382); bi-level: arXiv 2407.16293. The l1 ball: Duchi et
al., "Efficient projections onto the l1-ball", ICML 2008.

All compute in double and return the precision they were given; what lies within the ball comes back
bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sclcore.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def matrix_of(weight: Tensor, axis: int) -> Tensor:
    """[features, elements]: the weights by where they are in dimension `axis`, 0 or 1.

    Those of a Linear or Conv are its output features and its input ones; of a ConvTranspose or
    Conv1D it is the other way round. Of grouped convolutions dimension 1 counts within a group: the
    features at the same place of each are one.
    """
    return weight.transpose(0, axis).flatten(1)


def weight_of(matrix: Tensor, weight: Tensor, axis: int) -> Tensor:
    """What `matrix_of` made of `weight`, with other values, in the shape of `weight`."""
    return matrix.view(weight.transpose(0, axis).shape).transpose(0, axis)


def _cut(sizes: Tensor, radius: Tensor) -> Tensor:
    """τ [n] by which each of n vectors has to be shrunk to lie in its l1 ball; 0 where it does.

    `sizes` [n, d] are absolute values, `radius` [n] at least 0. τ = max(0, max_k (S_k − η)/k), with
    S_k the sum of the k largest.
    """
    sums = sizes.sort(dim=1, descending=True).values.cumsum(1)
    counts = torch.arange(1, sizes.shape[1] + 1, device=sizes.device, dtype=sizes.dtype)
    return ((sums - radius[:, None]) / counts).max(1).values.clamp(min=0)


def project_vectors(matrix: Tensor, radius: Tensor) -> Tensor:
    """Each row of a matrix [n, d] onto the l1 ball of its own radius [n]: the nearest point."""
    values = matrix.double()
    sizes = values.abs()
    tau = _cut(sizes, radius.double())[:, None]
    return torch.where(sizes > tau, values - values.sign() * tau, 0.0).to(matrix.dtype)


def _left(norms: Tensor, radius: float) -> Tensor:
    """What each group may keep of its norm: their vector [n], on the l1 ball of `radius`."""
    return project_vectors(norms[None], norms.new_tensor([radius]))[0]


def _sizes(matrix: Tensor) -> Tensor:
    return matrix.double().abs()


def _l1(matrix: Tensor) -> float:
    return float(_sizes(matrix).sum())


def _l21(matrix: Tensor) -> float:
    return float(matrix.double().norm(dim=1).sum())


def _l1inf(matrix: Tensor) -> float:
    return float(_sizes(matrix).amax(1).sum())


def _onto_l1(matrix: Tensor, radius: float) -> Tensor:
    flat = matrix.reshape(1, -1)
    return project_vectors(flat, flat.new_tensor([radius], dtype=torch.float64)).view(matrix.shape)


def _onto_l21(matrix: Tensor, radius: float) -> Tensor:
    norms = matrix.double().norm(dim=1)
    left = _left(norms, radius)
    scale = torch.where(norms > left, left / norms, 1.0)
    return (matrix.double() * scale[:, None]).to(matrix.dtype)


def _onto_l11(matrix: Tensor, radius: float) -> Tensor:
    return project_vectors(matrix, _left(_sizes(matrix).sum(1), radius))


def _onto_l1inf(matrix: Tensor, radius: float) -> Tensor:
    left = _left(_sizes(matrix).amax(1), radius)[:, None]
    return torch.clamp(matrix.double(), -left, left).to(matrix.dtype)


@dataclass(frozen=True)
class Ball:
    """A norm of matrices [groups, elements], and how they come onto its ball of some radius."""

    norm: Callable[[Tensor], float]
    _onto: Callable[[Tensor, float], Tensor]

    def project(self, matrix: Tensor, radius: float) -> Tensor:
        """A point of the ball; a copy of `matrix` where it lies within."""
        if self.norm(matrix) <= radius:
            return matrix.clone()
        # −0 becomes 0: files of equal networks should be equal.
        return self._onto(matrix, radius) + 0.0


BALLS = {
    "l1": Ball(_l1, _onto_l1),
    "l21": Ball(_l21, _onto_l21),
    "l11": Ball(_l1, _onto_l11),
    "l1inf": Ball(_l1inf, _onto_l1inf),
}
"""By the names that `method.ball` has."""
