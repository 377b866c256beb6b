"""Every key of a recipe, for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from launcher.recipe.recipe import Recipe
from sclcore.registry import known_methods


def describe() -> str:
    """Every key of a recipe with its default and meaning, one a line."""
    return "\n".join(_describe(Recipe, ""))


def _describe(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, info in model.model_fields.items():
        options = [info.annotation, *get_args(info.annotation)]
        nested = [("", o) for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if key == "method":
            nested = [(f" ({name})", kind) for name, kind in known_methods().items()]
        for variant, block in nested:
            yield f"{prefix}{key}{variant}: {(block.__doc__ or '').splitlines()[0]}"
            yield from _describe(block, f"  {prefix}{key}.")
        if not nested:
            default = "required" if info.is_required() else f"default {_default(info)!r}"
            yield f"{prefix}{key} ({default}): {info.description or ''}"


def _default(info: Any) -> Any:
    value = info.get_default(call_default_factory=True)
    return str(value) if isinstance(value, Path) else value
