"""The order of samples: its invariants, checked on many sets, worlds and positions."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.stream import plan as plan_module
from data.stream.plan import BatchPlan, EpochOrder, check_feasible, epoch_order, eval_batches

SIZES = st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
SEEDS = st.integers(0, 2**63)
EPOCHS = st.integers(0, 1000)


@pytest.fixture(params=["one window", "many windows"])
def window(request, monkeypatch) -> str:
    if request.param == "many windows":
        monkeypatch.setattr(plan_module, "WINDOW", 128)
    return request.param


def test_order_is_a_permutation(window: str) -> None:
    @given(SIZES, SEEDS, EPOCHS)
    @settings(max_examples=60, deadline=None)
    def check(sizes: list[int], seed: int, epoch: int) -> None:
        order = epoch_order(sizes, seed, epoch)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(sum(sizes)))
        assert np.array_equal(order, epoch_order(sizes, seed, epoch))

    check()


def test_order_depends_on_seed_and_epoch(window: str) -> None:
    orders = [epoch_order([500, 500], seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            assert (a != b).mean() > 0.9


def test_order_never_changes_between_versions() -> None:
    # A changed order would silently break the resuming of runs: these are the values of 0.1 for
    # sets of one window, of 0.2 for larger ones.
    assert epoch_order([5, 5], 0, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    large = epoch_order([70_000, 10_000], 7, 3)
    assert large[[0, 1, 65_536, -1]].tolist() == [55270, 21790, 68109, 58756]


def test_small_sets_are_permuted_uniformly() -> None:
    first = np.array([epoch_order([3, 3], 0, epoch)[:2] for epoch in range(3000)])
    pairs = np.bincount(first[:, 0] * 6 + first[:, 1], minlength=36).reshape(6, 6)
    assert (np.diag(pairs) == 0).all()
    # 30 pairs, 100 expected each, standard deviation about 10.
    off = pairs[~np.eye(6, dtype=bool)]
    assert off.min() > 55
    assert off.max() < 150


def test_large_sets_read_shard_by_shard_and_mix_inside_windows() -> None:
    sizes = [5120] * 80
    order = EpochOrder(sizes, 0, 0)
    ids = epoch_order(sizes, 0, 0)
    seen: list[int] = []
    for window in range(order.windows):
        part = ids[window * plan_module.WINDOW : (window + 1) * plan_module.WINDOW]
        shards = order.shards(window)
        assert set(shards) == set((part // 5120).tolist())
        assert len(shards) <= plan_module.WINDOW // 5120 + 2
        # Every shard of the window has its share of every stretch of 1,024 samples.
        whole = np.bincount(part[:1024] // 5120, minlength=80)[shards][1:-1]
        expected = 1024 * 5120 / len(part)
        assert (abs(whole - expected) < 6 * expected**0.5).all()
        seen += shards
    # A shard cut by the end of a window is read in two windows that follow one another.
    assert len(seen) - len(set(seen)) <= order.windows - 1
    assert sorted(set(seen)) == list(range(80))
    assert epoch_order(sizes, 0, 1)[:1024].tolist() != ids[:1024].tolist()


def test_any_stretch_is_that_of_the_whole_order(window: str) -> None:
    @given(SIZES, SEEDS, st.data())
    @settings(max_examples=60, deadline=None)
    def check(sizes: list[int], seed: int, data) -> None:
        first = data.draw(st.integers(0, sum(sizes)))
        end = data.draw(st.integers(first, sum(sizes)))
        stretch = EpochOrder(sizes, seed, 3).ids(first, end)
        assert np.array_equal(stretch, epoch_order(sizes, seed, 3)[first:end])

    check()


@pytest.mark.parametrize("sizes", [[5000] * 256, [5000] * 10_000], ids=["ImageNet", "50 million"])
def test_starting_anywhere_costs_little(sizes: list[int]) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    plan = BatchPlan(sizes, 0, 1024)
    batch = next(plan.micro_batches(epoch=7, start_step=plan.steps_per_epoch - 5))
    took = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(batch) == 1024
    assert took < 1
    assert peak < 8e6


def test_pairs_of_positions_share_a_micro_batch() -> None:
    # Mixing augmentation pairs positions 2k and 2k + 1 of the epoch's order.
    order = epoch_order([100, 60], 1, 2).reshape(-1, 2).tolist()
    for world, accumulation in ((1, 1), (2, 1), (2, 2), (4, 2)):
        pairs = []
        for rank in range(world):
            plan = BatchPlan([100, 60], 1, 16, world, rank, accumulation)
            assert plan.micro_batch_size % 2 == 0
            pairs += [pair for m in plan.micro_batches(2) for pair in m.reshape(-1, 2).tolist()]
        assert sorted(pairs) == sorted(order)


@given(
    SIZES,
    st.integers(0, 9),
    EPOCHS,
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 4),
    st.sampled_from([7, 64, plan_module.WINDOW]),
)
@settings(max_examples=80, deadline=None)
def test_global_batches_are_the_same_for_any_world(
    sizes: list[int],
    seed: int,
    epoch: int,
    world: int,
    accumulation: int,
    unit: int,
    window: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "WINDOW", window)
        _check_global_batches(sizes, seed, epoch, world, accumulation, unit)


def _check_global_batches(
    sizes: list[int], seed: int, epoch: int, world: int, accumulation: int, unit: int
) -> None:
    batch = 12 * unit
    if sum(sizes) < batch:
        return
    if batch % (world * accumulation):
        accumulation = 1
    single = BatchPlan(sizes, seed, batch)
    reference = list(single.micro_batches(epoch))
    assert len(reference) == single.steps_per_epoch == sum(sizes) // batch
    plans = [BatchPlan(sizes, seed, batch, world, rank, accumulation) for rank in range(world)]
    parts = [list(plan.micro_batches(epoch)) for plan in plans]
    for step, expected in enumerate(reference):
        mine = [part[step * accumulation : (step + 1) * accumulation] for part in parts]
        assert np.array_equal(np.concatenate([m for rank in mine for m in rank]), expected)
    everything = np.concatenate(reference)
    assert len(np.unique(everything)) == len(everything) == sum(sizes) - single.dropped
    assert all(len(m) == plans[0].micro_batch_size for part in parts for m in part)


def test_seeking_equals_replaying(window: str) -> None:
    @given(SIZES, st.integers(0, 9), st.integers(1, 40), st.data())
    @settings(max_examples=60, deadline=None)
    def check(sizes: list[int], seed: int, batch: int, data) -> None:
        batch = min(2 * batch, sum(sizes) // 2 * 2)
        if batch < 2:
            return
        plan = BatchPlan(sizes, seed, batch, world_size=1, rank=0, accumulation=2)
        step = data.draw(st.integers(0, plan.steps_per_epoch))
        replayed = list(plan.micro_batches(5))[2 * step :]
        sought = list(plan.micro_batches(5, step))
        assert len(sought) == len(replayed)
        assert all(np.array_equal(a, b) for a, b in zip(sought, replayed, strict=True))

    check()


@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 70))
@settings(max_examples=150, deadline=None)
def test_evaluation_covers_each_sample_exactly_once(samples: int, world: int, batch: int) -> None:
    ranks = [list(eval_batches(samples, world, rank, batch)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    sizes = {(len(ids), len(valid)) for batches in ranks for ids, valid in batches}
    assert len(sizes) == 1
    assert max(sizes.pop()) <= batch
    counted = np.concatenate([ids[valid] for batches in ranks for ids, valid in batches])
    assert np.array_equal(np.sort(counted), np.arange(samples))
    assert all(ids.max() < samples for batches in ranks for ids, _ in batches)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            (1000, 100, 8),
            r"100 cannot be divided among 8 ranks × 1 .*; the nearest possible: 96 or 104",
        ),
        ((1000, 100, 8, 3), r"8 ranks × 3 accumulation steps; the nearest possible: 96 or 120"),
        ((1000, 3, 8), r"the nearest possible: 8$"),
        ((360, 512, 8), r"360 samples, fewer than one global batch of 512 .*at most 360$"),
        ((361, 512, 4), r"a global_batch_size of at most 360$"),
        ((3, 8, 8), r"use at most 3 ranks"),
        ((100, 0), r"global_batch_size is 0; it must be at least 1"),
        ((100, 10, 0), r"world_size is 0"),
        ((100, 10, 1, 0), r"accumulation is 0"),
        ((1000, 300, 1, 2, 7), r"7 data workers .* only 6 micro-batches per epoch; use at most 6"),
    ],
)
def test_infeasible_numbers_are_refused_with_what_would_do(
    arguments: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        check_feasible(*arguments)


def test_feasible_numbers_pass() -> None:
    check_feasible(1000, 300, 1, 2, 6)
    check_feasible(8, 8, 8)


def test_plan_refuses_what_is_infeasible() -> None:
    with pytest.raises(DataError, match="cannot be divided"):
        BatchPlan([100], 0, 10, world_size=3)
    with pytest.raises(DataError, match="rank 2 is not one of 2 ranks"):
        BatchPlan([100], 0, 10, world_size=2, rank=2)
    with pytest.raises(DataError, match="seed is -1"):
        BatchPlan([100], -1, 10)


@pytest.mark.parametrize("arguments", [(0, 1, 0, 1), (1, 1, 1, 1), (1, 1, 0, 0), (1, 0, 0, 1)])
def test_impossible_evaluation_is_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(DataError, match="is impossible"):
        list(eval_batches(*arguments))
