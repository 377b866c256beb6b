"""Recipes for people to read: a page of all keys, and a complete file with a comment at each."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from launcher.errors import UsageError
from launcher.recipe.keys import EXAMPLES, Key, Section, all_keys, sections
from launcher.recipe.kinds import joined, written
from sclcore.registry import known_methods

_WIDTH = 96
_HEAD = """\
A recipe is one YAML file that says everything of a run. Every key may be set on the command line
as well: --set optim.epochs=30. Text needs no quotes; null is nothing; 1e-3 is a number.

    base: other.yaml        at the top of a file: all that it does not say itself is taken from
                            other.yaml, whose path is relative to this file, and which may have a
                            base in turn. A mapping is merged key by key; one that gets another
                            name (method, model, optim) is replaced as a whole.

A complete file with a comment at each key:  scl recipe --yaml scl
One key or section:                          scl recipe method.lam, scl recipe optim
"""


def describe(part: str | None = None) -> str:
    """Every key with what may stand there, its default and its meaning; or those of `part` alone.

    Raises UsageError where there is no such key or section.
    """
    lines = [*_page(sections(), part)]
    if not lines:
        raise UsageError(
            f"there is no key or section {part!r} in a recipe: `scl recipe` lists all of them"
        )
    return "\n".join([*([_HEAD] if part is None else []), *lines]).rstrip()


def _page(items: tuple[Key | Section, ...], part: str | None) -> Iterator[str]:
    for item in items:
        inside = part is None or item.path == part or item.path.startswith(f"{part}.")
        if isinstance(item, Section):
            below = [*_page(item.items, None if inside else part)]
            if below and inside:
                method = f", with name: {item.method}" if item.path == "method" else ""
                optional = " Or null." if item.optional else ""
                yield f"{item.path}{method}: {item.about}{optional}"
                yield ""
            yield from below
        elif inside:
            default = "required" if item.field.is_required() else f"default {_default(item)}"
            yield f"  {item.path} ({item.kind}; {default})"
            yield from _wrapped(item.about, "      ")
            yield ""


def as_yaml(method: str) -> str:
    """A complete recipe with method `method`: every key with its default and a comment.

    What has no default has an example; what is null but a mapping otherwise is a comment.
    Raises UsageError where there is no such method.
    """
    if method not in known_methods():
        raise UsageError(
            f"there is no method {method!r} to write a recipe for: choose {joined(known_methods())}"
        )
    lines = [
        f"# Every key of a recipe, with its default; method: {method}. Keys may be left out but",
        "# for those whose comment says that they are required.",
    ]
    lines += _yaml(sections(), method, "", _filled(method))
    return "\n".join(lines) + "\n"


def _filled(method: str) -> dict[str, object]:
    """What needs a value: the examples, and what shows the method itself."""
    ours = [key for key in all_keys() if key.method in (None, method)]
    values = {k.path: EXAMPLES.get(k.path) for k in ours if k.field.is_required()}
    # One of several keys that are null by default, of which one is needed.
    shows_itself = known_methods()[method].example or ({"lam": 0.1} if method == "scl" else {})
    empty = {k.path for k in ours if k.field.is_required() or k.default is None}
    own = {f"method.{name}": value for name, value in shows_itself.items()}
    return values | {path: value for path, value in own.items() if path in empty}


def _yaml(
    items: tuple[Key | Section, ...], method: str, indent: str, filled: dict[str, object]
) -> Iterator[str]:
    for item in items:
        if item.method not in (None, method):
            continue
        name = item.path.rpartition(".")[2]
        if isinstance(item, Section):
            yield ""
            yield from _wrapped(item.about, f"{indent}# ")
            below = [*_yaml(item.items, method, f"{indent}  ", filled)]
            if item.optional:
                yield f"{indent}{name}: null"
                yield from (
                    f"{indent}# {line.removeprefix(indent)}" for line in (f"{name}:", *below)
                )
            else:
                yield f"{indent}{name}:"
                yield from below
            continue
        required = "required: " if item.field.is_required() else ""
        yield from _wrapped(f"{item.about} ({required}{item.kind})", f"{indent}# ")
        needed = item.field.is_required() or (item.default is None and item.path in filled)
        value = filled.get(item.path) if needed else item.default
        yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: object) -> str:
    text = written(value)
    # What YAML would read as something else than text.
    return f"'{text}'" if isinstance(value, str) and (not text or text[0] in "{[*&!|>%@`") else text


def _default(key: Key) -> str:
    return written(key.default) if key.default != "" else "empty"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), _WIDTH, initial_indent=indent, subsequent_indent=indent
    )
