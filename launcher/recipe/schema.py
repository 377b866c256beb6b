"""Recipes for editors: a JSON schema, with which they complete keys and mark what is wrong."""

from __future__ import annotations

import json
from typing import Any

from launcher.recipe.recipe import Recipe
from sclcore.registry import known_methods

SCHEMA_NAME = "schema.json"


def schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of a recipe's file.

    A file with a `base` need not say anything else. Methods are told apart by their name; one of
    another package (`package.module:Class`) may have any keys.
    """
    whole = Recipe.model_json_schema()
    shared = whole.pop("$defs")
    methods = []
    for name, kind in known_methods().items():
        own = kind.model_json_schema()
        shared |= own.pop("$defs", {})
        own["properties"]["name"] = {
            "const": name,
            "description": kind.model_fields["name"].description,
        }
        methods.append({**own, "title": f"method {name}"})
    foreign = {
        "title": "a method of another package",
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": r"^[\w.]+:\w+$"}},
    }
    required = {path: _take_required(block) for path, block in _blocks(whole, shared)}
    for own in (*methods, *shared.values()):
        _take_required(own)
    whole["properties"]["method"] = {
        # Without a name it is the base's method, whichever that is.
        "anyOf": [*methods, foreign],
        "description": "What is trained.",
    }
    base = {"type": "string", "description": "a recipe that all else is taken from, by its path"}
    whole["properties"] = {"base": base, **whole["properties"]}
    top = required.pop("")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **whole,
        "title": "A recipe of SCL",
        "if": {"not": {"required": ["base"]}},
        "then": {
            "required": top,
            "properties": {name: {"required": keys} for name, keys in required.items() if keys},
        },
        "$defs": dict(sorted(shared.items())),
    }


def as_text() -> str:
    """The schema as it stands in recipes/schema.json."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def _blocks(whole: dict[str, Any], shared: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The sections at the top by name, and the whole by no name."""
    found = [("", whole)]
    for name, value in whole["properties"].items():
        if (reference := value.get("$ref")) is not None:
            found.append((name, shared[reference.rpartition("/")[2]]))
    return found


def _take_required(block: dict[str, Any]) -> list[str]:
    return block.pop("required", [])
