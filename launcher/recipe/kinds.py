"""What may stand at a key, in words that a person would use."""

from __future__ import annotations

import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

_WORDS = "a word of letters, digits, '.', '_' and '-'"


def kind_of(field: FieldInfo) -> str:
    """Such as "a whole number of at least 1", "fp32, autocast or bf16", "a list of text"."""
    return _kind(field.annotation, field.metadata)


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values to choose from, also where something else may stand there as well."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(choice for part in get_args(annotation) for choice in choices_of(part))
    return ()


def is_list(annotation: Any) -> bool:
    """Whether a list stands there, or may."""
    if get_origin(annotation) in (Union, types.UnionType):
        return any(map(is_list, get_args(annotation)))
    return get_origin(annotation) in (list, tuple, set)


def joined(words: Iterable[str], by: str = "or") -> str:
    """`a, b or c`."""
    *others, last = words
    return f"{', '.join(others)} {by} {last}" if others else last


def _kind(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *more = arguments
        # Pydantic's Field inside of a union keeps its bounds in a list of its own.
        bounds = [b for m in more for b in (m.metadata if isinstance(m, FieldInfo) else [m])]
        return _kind(inner, bounds)
    if origin in (Union, types.UnionType):
        parts = [part for part in arguments if part is not type(None)]
        words = [*map(written, choices_of(annotation))]
        words += [_kind(part, metadata) for part in parts if not choices_of(part)]
        # Whoever may write text may write a path: it is one.
        words = [w for w in words if not (w == "a path" and "text" in words)]
        return joined([*words, "null"] if type(None) in arguments else words)
    if origin is Literal:
        return joined(map(written, arguments))
    if origin in (list, set):
        return f"a list of {_plural(_kind(arguments[0]))}" if arguments else "a list"
    if origin is tuple:
        return f"a list of {len(arguments)} {_plural(_kind(arguments[0]))}"
    if origin is dict:
        if arguments[1] is Any:
            return "a mapping of keys to values"
        return f"a mapping of patterns to {_plural(_kind(arguments[1]))}"
    if annotation is str:
        return _WORDS if any(getattr(m, "pattern", None) for m in metadata) else "text"
    names = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    if annotation in (int, float):
        return names[annotation] + _bounds(metadata)
    return names.get(annotation, "a value")


def written(value: Any) -> str:
    """A value as YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(v)}" for key, v in value.items()) + "}"
    if isinstance(value, float):
        # Three quarters and its kin need no sixteen digits to be recognised.
        return (
            f"{value:.4g}" if abs(float(f"{value:.4g}") - value) < 1e-4 * abs(value) else f"{value}"
        )
    return str(value)


def _bounds(metadata: Iterable[Any]) -> str:
    found = {
        name: getattr(m, name)
        for m in metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(m, name, None) is not None
    }
    words = {"ge": "of at least", "gt": "above", "le": "up to", "lt": "below"}
    text = " and ".join(f"{words[k]} {written(found[k])}" for k in words if k in found)
    return f" {text}" if text else ""


def _plural(kind: str) -> str:
    head, _, rest = kind.removeprefix("a ").partition(" of ")
    if head in ("number", "whole number", "path"):
        return f"{head}s" + (f" of {rest}" if rest else "")
    return kind.replace("a number", "numbers").replace("a whole number", "whole numbers")
