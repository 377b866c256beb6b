"""A split of the digits and a run on it, as the figures of docs/ make them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from docs.figures.split_training import density, split, structure, top1, train
from launcher.recipe.load import load_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "compare_digits" / "digits.yaml"


def test_a_split_holds_back_other_images_each_time() -> None:
    one, again, other = split(0), split(0), split(1)
    assert torch.equal(one.held_back, again.held_back)
    assert not torch.equal(one.held_back.sort().values, other.held_back.sort().values)
    assert len(torch.cat([one.train, one.held_back]).unique()) == len(one.labels)
    trained_on = one.images[one.train]
    assert abs(float(trained_on.mean())) < 1e-5 and float(trained_on.std()) == pytest.approx(1)


def test_a_structure_is_kept_when_it_is_trained_again() -> None:
    recipe = load_recipe(RECIPE, ["optim.epochs=4", "method.lam=0.1"])
    digits = split(0)
    model = train(recipe, digits, 0)
    found = structure(model)
    same = structure(train(recipe, digits, 0))
    assert found.keys() == same.keys() and all(torch.equal(found[k], same[k]) for k in found)
    assert 0.05 < density(found) < 0.9

    again = train(recipe, digits, 0, found)
    assert all(not (now & ~found[name]).any() for name, now in structure(again).items())
    assert top1(again, digits) > 0.5
