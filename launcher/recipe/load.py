"""A recipe from its file: `base` followed, overrides applied, mistakes said in one sentence."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from launcher.errors import UsageError
from launcher.recipe.problems import sentence
from launcher.recipe.recipe import Recipe
from launcher.recipe.shipped import find_recipe
from launcher.recipe.yaml import Loader, where_and_why


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read `path`, follow its `base`, apply overrides such as `method.lam=0.2`, validate.

    Where there is no such file, SCL's own recipe of that name is read.
    Raises UsageError with one sentence: the file, the key, what is wrong with it.
    """
    found = find_recipe(path)
    return build_recipe(_read(found, ()), overrides, str(found))


def build_recipe(values: dict[str, Any], overrides: Iterable[str], where: str) -> Recipe:
    """Apply overrides to the plain values of a recipe and validate; `where` is for messages."""
    # All of them at once: what is set for a method holds wherever in the line its name is set.
    values = _merge(values, functools.reduce(_merge, map(_parse_override, overrides), {}))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        method = values.get("method")
        name = method.get("name") if isinstance(method, dict) else None
        raise UsageError(f"{where}: {sentence(error, name)}") from None


def read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """The YAML file `path`, which should hold a `kind`. Raises UsageError with one sentence."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise UsageError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {where_and_why(error)}") from error
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
    below = path.parent / str(base)
    if not below.is_file():
        raise UsageError(f"{path}: base: {base} is no file, looked for at {below}")
    return _merge(_read(below, (*seen, path.resolve())), values)


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
