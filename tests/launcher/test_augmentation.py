"""What the recipe's augmentation needs of batch and model is checked before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.recipe.load import load_recipe
from launcher.run.inputs import open_inputs

MIXING = ["data.mixup=0.2", "data.cutmix=1.0"]


@pytest.mark.parametrize(
    ("settings", "ranks", "fix"),
    [
        (["optim.global_batch_size=70"], 2, "micro-batches of 35, .*global_batch_size 68 or 72"),
        (["optim.global_batch_size=2"], 2, "micro-batches of 1, .*global_batch_size 4$"),
        (
            ["optim.global_batch_size=60", "engine.max_micro_batch=16"],
            2,
            "micro-batches of 15, .*engine.max_micro_batch 10",
        ),
    ],
)
def test_mixing_wants_whole_pairs(recipe: Path, settings: list[str], ranks: int, fix: str) -> None:
    with pytest.raises(UsageError, match=fix):
        open_inputs(load_recipe(recipe, [*MIXING, *settings]), ranks)
    open_inputs(load_recipe(recipe, settings), ranks)


def test_the_fix_that_is_named_works(recipe: Path) -> None:
    for settings in (
        ["optim.global_batch_size=72"],
        ["optim.global_batch_size=60", "engine.max_micro_batch=10"],
    ):
        plan = open_inputs(load_recipe(recipe, [*MIXING, *settings]), 2).plan(0)
        assert plan.micro_batch_size % 2 == 0


def test_a_model_of_one_size_cannot_be_trained_progressively(recipe: Path) -> None:
    vit = ["model.name=vit_tiny_patch16_224", "model.kwargs={img_size: 8, patch_size: 2}"]
    fixed = load_recipe(recipe, [*vit, "data.progressive.start=4"])
    with pytest.raises(UsageError, match=r"does not take images of 1×4×4 \(data.progressive.start"):
        open_inputs(fixed, 1)
    open_inputs(load_recipe(recipe, ["data.progressive.start=4"]), 1)
