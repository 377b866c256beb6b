"""What is wrong with a recipe, as one sentence that names the key and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from launcher.recipe.recipe import Recipe
from sclcore.registry import known_methods

_MAPPINGS = ("model_type", "model_attributes_type", "dict_type", "dataclass_type")
_LISTS = ("list_type", "tuple_type", "set_type")


def sentence(error: ValidationError, method: str | None = None) -> str:
    """The first problem of a recipe of `method` as a sentence, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    location = [str(part) for part in first["loc"]]
    method = method if location[:1] == ["method"] else None
    text = _sentence(first["type"], location, method, first["msg"], first.get("input"))
    more = len(problems) - 1
    return text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _sentence(kind: str, location: list[str], method: str | None, reason: str, given: Any) -> str:
    key = ".".join(location)
    if kind == "extra_forbidden":
        return f"unknown key {key!r}{_hint(location, method)}"
    if kind == "missing":
        return f"the key {key!r} is missing"
    if kind == "unknown_method":
        return reason
    # What a mapping holds is not shown: somebody may have put a key of W&B's there.
    shown = "a mapping" if isinstance(given, dict) else repr(given)
    plain = isinstance(given, str | int | float)
    if kind in _LISTS:
        write = f"; write {location[-1]}: [{given}]" if plain and kind == "list_type" else ""
        return f"{key}: should be a list, not {shown}{write}"
    if kind in _MAPPINGS:
        named = f"{key}.name" in dict(_all_keys())
        write = f"; write {key}.name={given}" if plain and named else ""
        return f"{key}: should be a mapping of keys to values, not {shown}{write}"
    reason = reason.removeprefix("Value error, ")
    return f"{key}: {reason[0].lower()}{reason[1:]}, not {shown}" if key else reason


def _hint(location: list[str], method: str | None) -> str:
    """What an unknown key may have meant: a key of the same block, else of another."""
    name, known = location[-1], dict(_all_keys())
    owners = known.get(".".join(location), ())
    if method and owners:
        return f" with method.name {method}: it is of {' and '.join(owners)}"
    block = ".".join(location[:-1])
    here = [
        path.rpartition(".")[2]
        for path, methods in known.items()
        if path.rpartition(".")[0] == block and (method in methods or not (method and methods))
    ]
    exact = [path for path in known if path.rpartition(".")[2] == name]
    if exact:
        return f"; did you mean {' or '.join(map(repr, exact[:3]))}?"
    if close := difflib.get_close_matches(name, here, n=1, cutoff=0.6):
        return f"; did you mean {close[0]!r}?"
    last = {path.rpartition(".")[2]: path for path in known}
    if close := difflib.get_close_matches(name, last, n=1, cutoff=0.8):
        return f"; did you mean {last[close[0]]!r}?"
    if close := difflib.get_close_matches(name, here, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    return f"; valid here: {', '.join(here)}"


def _all_keys() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every dotted key of a recipe, with the methods that have it (none: it is no method's)."""
    for name, field in Recipe.model_fields.items():
        yield name, ()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from ((f"{name}.{key}", ()) for key in field.annotation.model_fields)
    owners: dict[str, tuple[str, ...]] = {}
    for method, model in known_methods().items():
        for key in model.model_fields:
            owners[key] = (*owners.get(key, ()), method)
    yield from ((f"method.{key}", methods) for key, methods in owners.items())
