"""What a recipe comes to is said before the first update, with the value that would do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.recipe.load import load_recipe
from launcher.run.prepare import prepare
from sclcore.methods.scl import SCLMethod


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
    # 0.3 of the time is enough, to two digits; and that is what auto takes.
    assert 0.1 / (0.1 * float(found[1])) == pytest.approx(0.3 * 96, rel=0.05)
    loaded = load_recipe(
        recipe, ["method.lam=0.1", "method.mask_lr=auto", "schedule.freeze_masks_at=0.5"]
    )
    auto = loaded.method.for_run(loaded.schedule, 192)
    assert isinstance(auto, SCLMethod) and auto.mask_lr == pytest.approx(0.1 / (0.1 * 0.3 * 96))


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
