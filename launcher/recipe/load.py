"""A recipe from its file: `base` followed, overrides applied, mistakes said in one sentence."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from launcher.errors import UsageError
from launcher.recipe.recipe import Recipe
from launcher.recipe.yaml import Loader


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read `path`, follow its `base`, apply overrides such as `method.lam=0.2`, validate.

    Raises UsageError with one sentence: the file, the key, what is wrong with it.
    """
    return build_recipe(_read(path, ()), overrides, str(path))


def build_recipe(values: dict[str, Any], overrides: Iterable[str], where: str) -> Recipe:
    """Apply overrides to the plain values of a recipe and validate; `where` is for messages."""
    # All of them at once: what is set for a method holds wherever in the line its name is set.
    values = _merge(values, functools.reduce(_merge, map(_parse_override, overrides), {}))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {_sentence(error)}") from None


def read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """The YAML file `path`, which should hold a `kind`. Raises UsageError with one sentence."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise UsageError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no {kind}: it should be a mapping of keys to values")
    return values


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UsageError(f"{path}: its chain of `base` files comes back to itself")
    values = read_mapping(path, "recipe")
    base = values.pop("base", None)
    if base is None:
        return values
    return _merge(_read(path.parent / str(base), (*seen, path.resolve())), values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins; a block whose `name` changes is another thing and is replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            renamed = "name" in old and value.get("name", old["name"]) != old["name"]
            merged[key] = value if renamed else _merge(old, value)
        else:
            merged[key] = value
    return merged


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set {text}: write it as key.sub=value, such as method.lam=0.2")
    try:
        parsed: Any = yaml.load(value, Loader=Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: the value is not valid YAML") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _sentence(error: ValidationError) -> str:
    """The first problem as a sentence, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    location = [str(part) for part in first["loc"]]
    # The discriminator's value stands in the location, though not in the file.
    if len(location) > 1 and location[0] == "method":
        location.pop(1)
    key = ".".join(location)
    given = first.get("input")
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(location[-1], _valid_names(first["loc"]), n=1, cutoff=0.5)
        names = ", ".join(_valid_names(first["loc"]))
        hint = f"did you mean {close[0]!r}?" if close else f"valid here: {names}"
        text = f"unknown key {key!r}; {hint}"
    elif first["type"] == "missing":
        text = f"the key {key!r} is missing"
    elif first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        *others, last = _method_names()
        text = (
            f"method.name must be {', '.join(others)} or {last}, not {(given or {}).get('name')!r}"
        )
    else:
        reason = first["msg"].removeprefix("Value error, ")
        # Not what is in a mapping: a key of W&B's that somebody put there must not be repeated.
        shown = "a mapping" if isinstance(given, dict) else repr(given)
        text = f"{key}: {reason[0].lower()}{reason[1:]}, not {shown}" if key else reason
    more = len(problems) - 1
    return text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _method_names() -> list[str]:
    """Of all methods, as recipes call them."""
    methods = get_args(Recipe.model_fields["method"].annotation)
    return [get_args(method.model_fields["name"].annotation)[0] for method in methods]


def _valid_names(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location[:-1]:
        for candidate in _models_of(model, str(part)):
            model = candidate
    return list(model.model_fields)


def _models_of(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The models a field may hold; a union's member is named by its discriminator instead."""
    if key in model.model_fields:
        annotation = model.model_fields[key].annotation
        options = get_args(annotation) if get_origin(annotation) else (annotation,)
        return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)][:1]
    siblings = get_args(Recipe.model_fields["method"].annotation)
    return [m for m in siblings if get_args(m.model_fields["name"].annotation) == (key,)]
