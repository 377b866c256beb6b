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
from data.stream.deal import spread
from data.stream.plan import (
    MIXED,
    SPREAD,
    BatchPlan,
    EpochOrder,
    check_feasible,
    epoch_order,
    eval_batches,
)

SIZES = st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
SPREAD_VALUES = [34494, 1633, 59511, 61128]
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
    # sets of one window, of 0.2 for larger ones that are mixed, of 0.3 for those that are spread.
    for kind in (MIXED, SPREAD):
        assert epoch_order([5, 5], 0, 0, kind).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    large = epoch_order([70_000, 10_000], 7, 3, MIXED)
    assert large[[0, 1, 65_536, -1]].tolist() == [55270, 21790, 68109, 58756]
    spread = epoch_order([70_000, 10_000], 7, 3, SPREAD)
    assert spread[[0, 1, 65_536, -1]].tolist() == SPREAD_VALUES


def test_small_sets_are_permuted_uniformly() -> None:
    first = np.array([epoch_order([3, 3], 0, epoch)[:2] for epoch in range(3000)])
    pairs = np.bincount(first[:, 0] * 6 + first[:, 1], minlength=36).reshape(6, 6)
    assert (np.diag(pairs) == 0).all()
    # 30 pairs, 100 expected each, standard deviation about 10.
    off = pairs[~np.eye(6, dtype=bool)]
    assert off.min() > 55
    assert off.max() < 150


@pytest.mark.parametrize("kind", [MIXED, SPREAD])
def test_large_sets_read_shard_by_shard_and_mix_inside_windows(kind: int) -> None:
    sizes = [5120] * 80
    order = EpochOrder(sizes, 0, 0, kind)
    ids = epoch_order(sizes, 0, 0, kind)
    seen: list[int] = []
    for window in range(order.windows):
        part = ids[window * plan_module.WINDOW : (window + 1) * plan_module.WINDOW]
        shards = np.unique(order.line(window) // 5120).tolist()
        assert set(shards) == set((part // 5120).tolist())
        assert len(shards) <= plan_module.WINDOW // 5120 + 2
        # Every shard of the window has its share of every stretch of 1,024 samples.
        ends = (order.line(window)[[0, -1]] // 5120).tolist()
        within = [shard for shard in shards if shard not in ends]
        whole = np.bincount(part[:1024] // 5120, minlength=80)[within]
        expected = 1024 * 5120 / len(part)
        assert (abs(whole - expected) < 6 * expected**0.5).all()
        seen += shards
    # A shard cut by the end of a window is read in two windows that follow one another.
    assert len(seen) - len(set(seen)) <= order.windows - 1
    assert sorted(set(seen)) == list(range(80))
    assert epoch_order(sizes, 0, 1, kind)[:1024].tolist() != ids[:1024].tolist()


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
    st.sampled_from([MIXED, SPREAD]),
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
    order: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "WINDOW", window)
        _check_global_batches(sizes, seed, epoch, world, accumulation, unit, order)


def _check_global_batches(
    sizes: list[int], seed: int, epoch: int, world: int, accumulation: int, unit: int, order: int
) -> None:
    batch = 12 * unit
    if sum(sizes) < batch:
        return
    if batch % (world * accumulation):
        accumulation = 1
    single = BatchPlan(sizes, seed, batch, order=order)
    reference = list(single.micro_batches(epoch))
    assert len(reference) == single.steps_per_epoch == sum(sizes) // batch
    plans = [
        BatchPlan(sizes, seed, batch, world, rank, accumulation, order) for rank in range(world)
    ]
    parts = [list(plan.micro_batches(epoch)) for plan in plans]
    as_it_comes = epoch_order(sizes, seed, epoch, order)
    for step, expected in enumerate(reference):
        mine = [part[step * accumulation : (step + 1) * accumulation] for part in parts]
        together = np.concatenate([m for rank in mine for m in rank])
        assert np.array_equal(np.sort(together), np.sort(expected))
        whole = as_it_comes[step * batch : (step + 1) * batch]
        assert np.array_equal(np.sort(expected), np.sort(whole))
        if sum(sizes) <= plan_module.WINDOW or order == MIXED:
            assert np.array_equal(together, whole)
    for plan, part in zip(plans, parts, strict=True):
        _check_windows(plan, part, epoch)
    everything = np.concatenate(reference)
    assert len(np.unique(everything)) == len(everything) == sum(sizes) - single.dropped
    assert all(len(m) == plans[0].micro_batch_size for part in parts for m in part)


def _check_windows(plan: BatchPlan, read: list[np.ndarray], epoch: int) -> None:
    """What is announced for a window is what is read, and the windows come in order."""
    first = epoch * plan.windows_per_epoch
    announced = [plan.window_ids(first + k) for k in range(plan.windows_per_epoch)]
    assert all((np.diff(ids) > 0).all() for ids in announced)
    windows = list(plan.windows(epoch))
    assert len(windows) == len(read)
    for ids, of_batch in zip(read, windows, strict=True):
        known = np.concatenate([announced[number - first] for number in of_batch])
        assert np.isin(ids, known).all()
    if plan.order == SPREAD and plan.samples > plan_module.WINDOW:
        assert np.array_equal(np.sort(np.concatenate(announced)), np.sort(np.concatenate(read)))


def test_pairs_are_the_same_for_any_world_where_batches_are_dealt_by_place(monkeypatch) -> None:
    monkeypatch.setattr(plan_module, "WINDOW", 64)
    pairs = {}
    for world, accumulation in ((1, 1), (2, 1), (3, 2), (4, 1), (6, 1)):
        plans = [BatchPlan([90, 150], 1, 24, world, r, accumulation) for r in range(world)]
        batches = [m for plan in plans for m in plan.micro_batches(2)]
        pairs[world] = sorted(pair for m in batches for pair in m.reshape(-1, 2).tolist())
    assert len({str(found) for found in pairs.values()}) == 1


@pytest.mark.parametrize("nodes", [2, 7, 8, 14, 64])
@pytest.mark.parametrize("a_node", [64, 256])
def test_a_node_reads_its_share_of_a_window(nodes: int, a_node: int) -> None:
    """In long stretches: of a share of the window, and of as many shards plus its edges."""
    sizes, size = [5004] * 40, plan_module.WINDOW
    for node in (0, nodes // 3, nodes - 1):
        ids = BatchPlan(sizes, 5, nodes * a_node, nodes, node).window_ids(1)
        shards = np.unique(ids // 5004)
        spans = [np.ptp(ids[ids // 5004 == shard]) + 1 for shard in shards]
        # A cut moves by a few samples of the batch from one to the next, at both ends: 12 of
        # `a_node` is the most that was seen.
        assert sum(spans) <= (1 + 12 / a_node) * size / nodes
        assert len(shards) <= 15 / nodes + 2


@given(st.integers(1, 3000), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_a_stretch_has_its_share_of_every_part(count: int, seed: int, data) -> None:
    order = spread(np.random.PCG64(seed).random_raw(2 * count))
    assert np.array_equal(np.sort(order), np.arange(count))
    first, low = (data.draw(st.integers(0, count)) for _ in range(2))
    end, high = data.draw(st.integers(first, count)), data.draw(st.integers(low, count))
    found = np.count_nonzero((order[first:end] >= low) & (order[first:end] < high))
    expected = (end - first) * (high - low) / count
    # Whole rounds are exact but for the two cells at the ends of the part, where chance has as many
    # as there are rounds: six standard deviations. In a part of a round each bit of its length may
    # be off by one, at both ends of stretch and part; so are cells that differ in size.
    rounds = (end - first) / min(256, max(1, count // 16))
    assert abs(found - expected) <= 6 * (rounds / 2) ** 0.5 + 4 * 8


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
