"""Shared weights: clusters as good as the best, draws without bias, and no weight dies of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from sclcore.sharing import Sharing, kmeans, quantised, share, shared_weight


def weights(size: int, density: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    live = torch.rand(size, size, generator=generator) < density
    return torch.randn(size, size, generator=generator).where(live, 0.0)


def least_of_all_partitions(values: np.ndarray, count: int) -> float:
    """Every way to cut the sorted values into `count` runs."""
    ranked = np.sort(values)
    ways = itertools.combinations(range(1, len(ranked)), count - 1)
    runs = ([ranked[a:b] for a, b in itertools.pairwise((0, *cuts, len(ranked)))] for cuts in ways)
    return min(sum(float(((run - run.mean()) ** 2).sum()) for run in cut) for cut in runs)


def test_kmeans_against_every_partition() -> None:
    generator = np.random.default_rng(0)
    for case in range(200):
        size = int(generator.integers(4, 11))
        count = int(generator.integers(2, min(size, 5)))
        values = generator.standard_normal(size) ** (3 if case % 2 else 1)
        means, index = kmeans(values, count)
        assert len(means) == count and (np.diff(means) > 0).all()
        # Each value has the mean that is nearest.
        nearest = np.abs(values[:, None] - means).argmin(1)
        assert np.array_equal(index, nearest)
        found = float(((values - means[index]) ** 2).sum())
        assert found == pytest.approx(least_of_all_partitions(values, count), rel=1e-9)


def test_kmeans_of_many_weights_is_as_fine_as_theory_says() -> None:
    """Panter and Dite 1951: of a normal density the least mean square error of k values tends to
    √3 π / 2 k² from below; 10 % are left for that limit and for what Lloyd's algorithm misses."""
    values = np.random.default_rng(1).standard_normal(100_000)
    means, index = kmeans(values, 64)
    error = float(((values - means[index]) ** 2).mean())
    assert 0.9 < error / (np.sqrt(3) * np.pi / 2 / 64**2) < 1.1


def test_quantisation_is_unbiased_and_takes_quantiles() -> None:
    values = np.random.default_rng(2).standard_normal(500)
    cuts, _ = quantised(values, 5, np.random.default_rng(0))
    ranked = np.sort(values)
    assert np.array_equal(cuts, ranked[[0, 125, 250, 374, 499]])
    generator, rounds = np.random.default_rng(3), 4000
    total = np.zeros(500)
    for _ in range(rounds):
        cuts, index = quantised(values, 5, generator)
        drawn = cuts[index]
        total += drawn
    # A draw is one of the two neighbours.
    above = np.searchsorted(cuts, values)
    assert np.isin(index - above, [-1, 0]).all()
    upper, lower = cuts[above], cuts[np.maximum(above - 1, 0)]
    # The standard deviation of the mean; 5 of them are passed by 1 weight in 3·10⁶.
    deviation = np.sqrt((upper - values) * (values - lower) / rounds)
    assert (np.abs(total / rounds - values) <= 5 * deviation + 1e-12).all()


@pytest.mark.parametrize("kind", ["kmeans", "pq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_few_values_are_left_and_no_weight_dies(kind: str, dtype: torch.dtype) -> None:
    weight, sharing = weights(60).to(dtype), Sharing(kind, 16)
    shared = shared_weight(weight, sharing)
    assert (shared.dtype, shared.shape) == (weight.dtype, weight.shape)
    assert torch.equal(shared != 0, weight != 0)
    values, index = share(weight, sharing)
    assert 8 <= len(values) <= 16 and bool((values.diff() > 0).all())
    assert torch.equal(values[index], shared[shared != 0])
    assert torch.equal(shared_weight(weight, sharing), shared), "the same seed, the same values"
    # Sharing what is shared changes nothing: it has no more values than are allowed.
    assert torch.equal(shared_weight(shared, sharing), shared)
    other = shared_weight(weight, Sharing(kind, 16, seed=1))
    assert torch.equal(other != 0, weight != 0) and (kind == "kmeans" or not other.equal(shared))


def test_a_mean_of_zero_is_no_value() -> None:
    weight = torch.tensor([[-2.0, 2.0, 0.0, 30.0, -30.0, -1.0, 1.0, 29.0, -29.0]])
    values, index = share(weight, Sharing("kmeans", 3))
    assert values.tolist() == [-29.5, -1.0, 29.5] or values.tolist() == [-29.5, 1.0, 29.5]
    assert index.tolist() == [1, 1, 2, 0, 1, 1, 2, 0]


def test_odd_weights() -> None:
    assert torch.equal(shared_weight(torch.zeros(3, 3), Sharing("kmeans", 4)), torch.zeros(3, 3))
    transposed = weights(40)[:, :30].T
    shared = shared_weight(transposed, Sharing("pq", 4))
    assert torch.equal(shared != 0, transposed != 0) and len(shared.unique()) == 5
    with pytest.raises(ValueError, match="values that are not finite"):
        shared_weight(torch.tensor([[1.0, torch.inf]]), Sharing("pq", 2))
    with pytest.raises(ValueError, match="kmeans:1 should be kmeans or pq of 2 values or more"):
        Sharing("kmeans", 1)
    with pytest.raises(ValueError, match="median:3 should be"):
        Sharing("median", 3)
