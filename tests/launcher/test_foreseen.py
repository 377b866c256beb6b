"""What a recipe comes to is said before the first update, with the value that would do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.recipe.load import load_recipe
from launcher.recipe.recipe import resume_difference
from launcher.run.prepare import prepare
from sclcore.methods.scl import SCLMethod
from sclcore.schedule import Schedule


def _of(recipe: Path, *settings: str, steps: int = 192) -> list[str]:
    fixed = ["method.lam=0.1", "method.mask_lr=0.001", "schedule.freeze_masks_at=0.5"]
    loaded = load_recipe(recipe, [*fixed, *settings])
    return loaded.method.foreseen(loaded.schedule, steps)


def test_masks_that_are_too_slow_are_named_with_a_rate_that_does(recipe: Path) -> None:
    [warning] = _of(recipe)
    assert "takes 1,000 updates to die, and masks learn in 96 of this run's 192" in warning
    found = re.search(r"method\.mask_lr=auto would do, or ([0-9.e-]+)", warning)
    assert found and _of(recipe, f"method.mask_lr={found[1]}") == []
    assert _of(recipe, "method.mask_lr=auto") == []
    assert updates_to_die(float(found[1]), lam=0.1) == pytest.approx(0.3 * 96, abs=2)
    loaded = load_recipe(
        recipe, ["method.lam=0.1", "method.mask_lr=auto", "schedule.freeze_masks_at=0.5"]
    )
    auto = loaded.method.for_run(loaded.schedule, 192)
    assert isinstance(auto, SCLMethod) and isinstance(auto.mask_lr, float)
    assert auto.mask_lr == pytest.approx(float(found[1]), rel=0.05), "to two digits"


def updates_to_die(mask_lr: float, *, lam: float, momentum: float = 0.9) -> int:
    """Of a connection without gradient, update by update."""
    mask, velocity, updates = 1.0, 0.0, 0
    while mask > 0:
        velocity = momentum * velocity + lam
        mask, updates = mask - mask_lr * velocity, updates + 1
    return updates


@pytest.mark.parametrize("learning", [3, 20, 33, 110, 350, 440, 880, 100_000])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.98])
def test_a_connection_without_gradient_dies_within_a_share_of_any_run(
    momentum: float, learning: int
) -> None:
    method = SCLMethod(lam=0.2, mask_momentum=momentum)
    rate = method.for_run(Schedule(freeze_masks_at=0.5), 2 * learning).mask_lr
    assert isinstance(rate, float)
    died = updates_to_die(rate, lam=0.2, momentum=momentum)
    # What momentum takes to start is left out where it is a fortieth of the time at most.
    assert 0.3 * learning <= died + 1e-9 <= (0.3 + 1 / 40) * learning + 1


@pytest.mark.parametrize(("learning", "expected"), [(400, 120), (2000, 160), (200_000, 160)])
def test_under_a_target_masks_of_a_long_run_are_no_slower(learning: int, expected: int) -> None:
    """What would die in so many updates at λ 0.5."""
    method = SCLMethod(target_density=0.1).for_run(Schedule(freeze_masks_at=0.5), 2 * learning)
    assert isinstance(method.mask_lr, float)
    # Momentum takes nine updates to start, which are left out of so many.
    died = updates_to_die(method.mask_lr, lam=0.5)
    assert expected <= died <= expected + 10


def test_a_gradient_counts_by_the_root_under_a_target_alone(recipe: Path) -> None:
    for setting, expected in (("lam=0.1", "full"), ("target_macs=0.1", "root")):
        assert _gradient_of(recipe, f"method.{setting}") == expected
    said = ("method.target_density=0.1", "method.mask_gradient=full")
    assert _gradient_of(recipe, *said) == "full"


def test_an_older_run_under_a_target_is_not_continued_in_another_way(recipe: Path) -> None:
    """Its masks took the full gradient, whether its recipe says so or is older than the key."""
    ours = load_recipe(recipe, ["method.lam=null", "method.target_density=0.1"])
    saved = ours.as_dict()
    for theirs in ({**saved["method"], "mask_gradient": "full"}, dict(saved["method"])):
        if theirs["mask_gradient"] == "root":
            del theirs["mask_gradient"]
        said = resume_difference({**saved, "method": theirs}, ours)
        assert said == "method.mask_gradient is 'root' here and 'full' there"


def _gradient_of(recipe: Path, *settings: str) -> str:
    method = load_recipe(recipe, ["method.lam=null", *settings]).method
    assert isinstance(method, SCLMethod)
    return method.mask_gradient


def test_a_lambda_beside_a_target_is_said_to_be_idle(recipe: Path) -> None:
    assert _of(recipe, "method.target_density=0.1") == [
        "method.lam is not used: target_density steers λ"
    ]


@pytest.mark.parametrize(
    ("setting", "steps"),
    [
        ("method.lam=2", 192),
        ("method.mask_momentum=0.999", 192),
        ("seed=1", 2001),
        ("schedule.freeze_masks_at=0", 192),
        ("method.lam=0", 192),
    ],
)
def test_nothing_is_said_where_masks_can_die_or_are_not_to(
    setting: str, steps: int, recipe: Path
) -> None:
    assert _of(recipe, setting, steps=steps) == []


@pytest.mark.parametrize("setting", ["schedule.lam_warmup=0.5", "schedule.mask_lr=cosine"])
def test_what_acts_only_in_part_counts_in_part(setting: str, recipe: Path) -> None:
    assert _of(recipe, steps=2001) == [] and _of(recipe, setting, steps=3900)
    assert _of(recipe, setting, steps=4010) == []


def test_it_is_among_the_notes_of_a_new_run(recipe: Path, tmp_path: Path) -> None:
    slow = load_recipe(recipe, ["method.mask_lr=1e-5", f"run_dir={tmp_path / 'run'}"])
    assert any("masks-too-slow" in note for note in prepare(slow, 1).initial.notes)
