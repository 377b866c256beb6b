"""docs/comparison.md on many splits: the tables are those of the CSV files; masks are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from docs.figures import comparison_splits as splits
from docs.figures.split_training import density, split, structure, top1, train

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "comparison.md"


def test_the_document_shows_what_the_csv_files_say() -> None:
    found = [*splits.settings("sweep.yaml"), *splits.settings("first_layer.yaml")]
    results = splits.read_csv("comparison_splits.csv")
    assert {r["setting"] for r in results} == {s.name for s in found}
    text = DOCUMENT.read_text()
    assert splits.spread_table(found, results) in text
    assert splits.gap_table(found, results) in text
    assert splits.why_table(results, splits.read_csv("comparison_structures.csv")) in text


def test_a_split_holds_back_other_images_each_time() -> None:
    one, again, other = split(0), split(0), split(1)
    assert torch.equal(one.held_back, again.held_back)
    assert not torch.equal(one.held_back.sort().values, other.held_back.sort().values)
    assert len(torch.cat([one.train, one.held_back]).unique()) == len(one.labels)
    trained_on = one.images[one.train]
    assert abs(float(trained_on.mean())) < 1e-5 and float(trained_on.std()) == pytest.approx(1)


def test_a_structure_is_kept_when_it_is_trained_again() -> None:
    [setting] = [s for s in splits.settings("sweep.yaml") if s.name == "scl-lam0.24"]
    # Connections die within the first epochs with so strong a λ.
    short = {
        "optim": setting.recipe.optim.model_copy(update={"epochs": 4}),
        "method": setting.recipe.method.model_copy(update={"lam": 2.0}),
    }
    recipe = setting.recipe.model_copy(update=short)
    digits = split(0)
    model = train(recipe, digits, 0)
    found = structure(model)
    same = structure(train(recipe, digits, 0))
    assert found.keys() == same.keys() and all(torch.equal(found[k], same[k]) for k in found)
    assert 0.1 < density(found) < 0.9

    again = train(recipe, digits, 0, found)
    assert all(not (now & ~found[name]).any() for name, now in structure(again).items())
    assert top1(again, digits) > 0.5
