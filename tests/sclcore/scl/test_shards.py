"""Sharded state: however it is cut, the same network is learned as with whole state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, connection_groups
from sclcore.optim.shards import Shard
from tests.sclcore.conftest import Runs
from tests.sclcore.sharded import ALL_RUNS, CASES, is_long

RUNS = [pytest.param(*r, marks=[pytest.mark.long] if is_long(*r) else []) for r in ALL_RUNS]
Single = Callable[[str], dict[str, Any]]


def _tolerance(name: str) -> float:
    """How far runs may be apart that differ only in the order of sums.

    A step rounds by about 2 · 2⁻⁵³ (float64), and what it rounds are numbers of order 1. Training
    with steps of 0.02 to 0.05 contracts more than it amplifies; 1e-11 is 1e5 such roundings, for
    100 steps through 6 layers. In float32 (2⁻²⁴) the same number of them would be 1e-2, so there
    the equal masks are the proof, and 1e-3 is asked for the weights, of which the smallest step is
    some 1e-2.
    """
    case = CASES[name]
    if case.same_data:
        return 0.0
    return 1e-11 if case.dtype == torch.float64 else 1e-3


def _close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and value.shape == b[name].shape
        torch.testing.assert_close(value, b[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(("name", "kind", "world"), RUNS)
def test_sharded_state_learns_the_same_network(
    name: str, kind: str, world: int, sharded_runs: Runs, whole_run: Single
) -> None:
    single, ranks = whole_run(name), sharded_runs[name, kind, world]
    tolerance = _tolerance(name)
    for rank in ranks:
        assert rank["live"] == single["live"], "exact"
        assert rank["hashes"] == single["hashes"]
        assert rank["held"] == single["held"], "the same layers are named on all ranks"
        assert rank["skipped"] == single["skipped"]
        assert rank["updates"] == single["updates"]
        _close(rank["masks"], single["masks"], 0.0)
        # bfloat16 rounds all that away again, with the same draws whatever rank rounds.
        exact = CASES[name].options.get("mask_dtype") == "bfloat16"
        _close(rank["mask_variables"], single["mask_variables"], 0.0 if exact else tolerance)
        _close(rank["parameters"], single["parameters"], tolerance)
        _close({"sample": rank["sample"]}, {"sample": single["sample"]}, max(tolerance, 1e-6))
        # Among ranks nothing differs at all: they do each sum once and tell each other.
        for part in ("masks", "mask_variables", "parameters"):
            _close(rank[part], ranks[0][part], 0.0)
        assert torch.equal(rank["sample"], ranks[0]["sample"])


@pytest.mark.parametrize(("name", "kind", "world"), RUNS)
def test_observations_are_those_of_whole_state(
    name: str, kind: str, world: int, sharded_runs: Runs, whole_run: Single
) -> None:
    single = whole_run(name)["seen"]
    assert single
    for rank in sharded_runs[name, kind, world]:
        for seen, expected in zip(rank["seen"], single, strict=True):
            assert seen.keys() == expected.keys()
            for layer, values in expected.items():
                assert seen[layer]["flips"] == values["flips"]
                assert seen[layer]["revivals"] == values["revivals"]
                for key in ("rms_before", "rms_after"):
                    # The mask gradients are of order 1e-3 to 1; see _tolerance.
                    tolerance = _tolerance(name) or 1e-5
                    torch.testing.assert_close(
                        seen[layer][key], values[key], rtol=tolerance, atol=tolerance
                    )


@pytest.mark.parametrize(("name", "kind", "world"), RUNS)
def test_flips_over_many_steps_are_those_of_whole_state(
    name: str, kind: str, world: int, sharded_runs: Runs, whole_run: Single
) -> None:
    single = whole_run(name)["flips"]
    assert single
    for rank in sharded_runs[name, kind, world]:
        assert rank["flips"] == single


MOVING = [name for name, case in CASES.items() if case.steps == 100 and name != "tiny"]


@pytest.mark.parametrize("name", MOVING)
def test_the_comparison_means_something(name: str, whole_run: Single) -> None:
    """Connections die and come back, and no layer is all dead or all live."""
    single = whole_run(name)
    density = sum(single["live"][-1]) / 717
    assert 0.05 < density < 0.9
    seen = [values for step in single["seen"] for values in step.values()]
    assert sum(values["flips"] for values in seen) >= 10
    assert sum(values["revivals"] for values in seen) >= 1
    assert len(set(single["hashes"])) > 5


@pytest.mark.parametrize(("name", "kind", "world"), [r for r in ALL_RUNS if r[0] == "usual"])
def test_two_messages_per_step(name: str, kind: str, world: int, sharded_runs: Runs) -> None:
    for rank in sharded_runs[name, kind, world]:
        first, *others = rank["messages"]
        # First of all the ranks tell each other what they hold.
        assert first[0] == -1 and len(first) == 3
        # With `observing`, three more: counts, and two rms of all features.
        assert [len(m) for m in others] == [5 if i % 10 == 3 else 2 for i in range(len(others))]


@pytest.mark.parametrize("world", [2, 3])
def test_the_message_does_not_grow_with_the_features(world: int, sharded_runs: Runs) -> None:
    sizes = {}
    for name in ("narrow", "broad"):
        for rank in sharded_runs[name, "flat", world]:
            sizes.setdefault(name, set()).add(rank["messages"][1][0])
    # The caller's number; layer sums and counts of 2 tensors; the feature at each boundary.
    assert sizes["narrow"] == sizes["broad"] == {1 + 3 * 2 + world - 1}


@pytest.mark.parametrize(
    ("name", "most"), [("feature", 2), ("n-m", 3), ("coarse", 2), ("guard", 5), ("bf16-exact", 2)]
)
def test_messages_in_the_worst_case(name: str, most: int, sharded_runs: Runs) -> None:
    """Those two; N:M blocks that are cut need another one, a layer that dies the best of all."""
    for rank in sharded_runs[name, "flat", 3]:
        for index, messages in enumerate(rank["messages"]):
            extra = 3 if index % 10 == 4 else 0
            if -1 in messages and name != "guard":  # the ranks also told what they hold
                continue
            assert len([m for m in messages if m > 0]) <= most + extra


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("guard")])
def test_the_guard_acts_in_these_runs(name: str, whole_run: Single) -> None:
    single = whole_run(name)
    assert any(single["held"])
    least = CASES[name].options.get("min_connections", 1)
    # The smallest layer has 60 connections, of which 2:4 leaves 30.
    least = min(least, 30 if CASES[name].groups.get("n_m") else 60)
    assert all(count >= least for step in single["live"] for count in step)


@pytest.mark.parametrize(("name", "kind", "world"), [r for r in ALL_RUNS if r[0] == "poison"])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(
    name: str, kind: str, world: int, sharded_runs: Runs
) -> None:
    case = CASES[name]
    assert case.poison is not None
    for rank in sharded_runs[name, kind, world]:
        assert rank["skipped"] == 1
        finite = [math.isfinite(norm) for norm in rank["norms"]]
        assert finite == [i != case.poison[0] for i in range(case.steps)]
        assert all(bool(p.isfinite().all()) for p in rank["parameters"].values())


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.long), 3])
def test_fsdp_knows_the_norm_of_the_whole_gradient(
    world: int, sharded_runs: Runs, whole_run: Single
) -> None:
    for rank in sharded_runs["feature", "fsdp", world]:
        assert rank["norms"] == pytest.approx(whole_run("feature")["norms"], rel=1e-10)


@pytest.mark.parametrize("kind", ["flat", "fsdp"])
def test_connections_before_are_those_of_the_step_before(kind: str, sharded_runs: Runs) -> None:
    for rank in sharded_runs["feature", kind, 3]:
        assert rank["before"][0] == [126, 63, 168, 108, 192, 60]
        # What was saved after step 50 was live all the same.
        assert rank["before"][1::5] == rank["live"]


def test_shards_that_do_not_make_up_the_tensor(sharded_runs: Runs) -> None:
    for rank in sharded_runs["refusals", "flat", 2]:
        assert "up2.weight" in rank["gap"] and "is missing" in rank["gap"]
        assert "up2.weight" in rank["overlap"] and "is there twice" in rank["overlap"]
        assert "out.weight" in rank["short"] and "of 60" in rank["short"]


def _flat_group(*shards: Shard, size: int = 12, whole: bool = False) -> None:
    layer = nn.Linear(4, 3, bias=False)
    optimizer = SCL(connection_groups(layer), lr=0.1, lam=0.1)
    flat = nn.Parameter(torch.zeros(size))
    optimizer.param_groups[0]["params"] = [flat, layer.weight] if whole else [flat]
    optimizer.set_shards({0: shards}, cast(Any, None))


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([Shard("weight", (4, 3), 0, 12, 0)], r"no weight of shape \(4, 3\)"),
        ([Shard("other", (3, 4), 0, 12, 0)], "no other of shape"),
        ([Shard("weight", (3, 4), 4, 12, 0)], "weight has 12 elements, not 4 to 16"),
        ([Shard("weight", (3, 4), -1, 12, 0)], "weight has 12 elements, not -1 to 11"),
        ([Shard("weight", (3, 4), 0, 12, 3)], "shard of weight lies outside of its flat tensor"),
        (
            [Shard("weight", (3, 4), 0, 4, 0), Shard("weight", (3, 4), 4, 8, 4)],
            "two shards of one tensor",
        ),
    ],
)
def test_a_shard_that_fits_nothing_is_refused(shards: list[Shard], message: str) -> None:
    _flat_group(Shard("weight", (3, 4), 0, 12, 0))  # this one is right
    with pytest.raises(ValueError, match=message):
        _flat_group(*shards)


def test_a_whole_tensor_beside_shards_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole tensor may be beside it"):
        _flat_group(Shard("weight", (3, 4), 0, 12, 0), whole=True)


def test_shards_of_a_dense_group_are_refused() -> None:
    optimizer = SCL(connection_groups(nn.Linear(4, 3)), lr=0.1, lam=0.1)
    with pytest.raises(ValueError, match="parameter group 1 has no connections"):
        optimizer.set_shards({1: []}, cast(Any, None))


def test_a_copy_asks_for_its_shards() -> None:
    """Without the ranks, its sums over features would silently be those of a part."""
    layer = nn.Linear(4, 3, bias=False)
    optimizer = SCL(connection_groups(layer), lr=0.1, lam=0.1)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(6))]
    optimizer.set_shards({0: [Shard("weight", (3, 4), 0, 6, 0)]}, cast(Any, None))
    with pytest.raises(RuntimeError, match="set_shards"):
        optimizer.live_connections()


def test_which_shards_a_rank_holds_is_no_part_of_what_is_saved() -> None:
    """Another run, with more ranks or fewer, would believe it."""
    layer = nn.Linear(4, 3, bias=False)
    optimizer = SCL(connection_groups(layer), lr=0.1, lam=0.1)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(6))]
    optimizer.set_shards({0: [Shard("weight", (3, 4), 0, 6, 0)]}, cast(Any, None))
    assert all("shards" not in group for group in optimizer.state_dict()["param_groups"])
    assert optimizer.param_groups[0]["shards"]


def test_checkpoint_tools_of_torch_save_and_load_it(sharded_runs: Runs) -> None:
    """Whole state by parameter name, as torch.distributed.checkpoint.state_dict has it."""
    for rank in sharded_runs["checkpoint", "fsdp", 2]:
        assert "conv.weight" in rank["names"]
        one, two = rank["hashes"]
        assert one == two
        first, second = rank["parameters"]
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
