"""Recipes of older versions in terms of today's."""

from __future__ import annotations

import dataclasses

from pydantic import ValidationError

from launcher.compare.entry import Entry

# Here and not where it is used: importing it brings PyTorch, a few seconds.
from launcher.recipe.recipe import Recipe


def filled(entry: Entry) -> Entry:
    """`entry` with every default in its recipe; as it is where today's recipes refuse it."""
    if not entry.recipe:
        return entry
    try:
        values = Recipe.model_validate(entry.recipe).as_dict()
    except ValidationError:
        return entry
    return dataclasses.replace(entry, recipe=values)
