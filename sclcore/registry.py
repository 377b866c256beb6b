"""Methods by the name that recipes call them: ours, those of installed packages, and by path."""

from __future__ import annotations

import difflib
import functools
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from pydantic_core import PydanticCustomError

import sclcore.methods
from sclcore.driver.method import Method

ENTRY_POINTS = "scl.methods"
# What others are compared with comes first.
_FIRST = ("dense", "scl")


def known_methods() -> dict[str, type[Method]]:
    """Every method that is installed: those of sclcore/methods, and of entry points."""
    return dict(_installed())


@functools.cache
def _installed() -> tuple[tuple[str, type[Method]], ...]:
    ours = {name_of(kind): kind for module in _modules() for kind in _declared(module)}
    found = {name: ours[name] for name in (*_FIRST, *sorted(ours.keys() - _FIRST))}
    for point in entry_points(group=ENTRY_POINTS):
        kind = _checked(point.load(), f"the entry point {point.value!r}")
        found.setdefault(name_of(kind), kind)
    return tuple(found.items())


def _modules() -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(sclcore.methods.__path__):
        yield import_module(f"{sclcore.methods.__name__}.{module.name}")


def _declared(module: ModuleType) -> Iterator[type[Method]]:
    for value in vars(module).values():
        ours = isinstance(value, type) and value.__module__ == module.__name__
        if ours and issubclass(value, Method) and isinstance(name_of(value), str):
            yield value


def name_of(kind: type[Method]) -> str:
    """The name of a method in recipes."""
    return kind.model_fields["name"].default


def find_method(name: str) -> type[Method]:
    """The method of that name; `package.module:Class` names one that is not installed as such.

    Raises ValueError with one sentence.
    """
    known = known_methods()
    if name in known:
        return known[name]
    if ":" in name:
        return _imported(name)
    *others, last = known
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"method.name must be {', '.join(others)} or {last}, or package.module:Class of your own, "
        f"not {name!r}{hint}"
    )


def _imported(path: str) -> type[Method]:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"method.name {path!r} cannot be imported: {error}; it should be package.module:Class, "
            "importable where scl is started"
        ) from error
    kind = _checked(found, f"method.name {path!r}")
    kind.imported_as = path
    return kind


def _checked(found: Any, what: str) -> type[Method]:
    is_method = isinstance(found, type) and issubclass(found, Method)
    if not is_method or not isinstance(name_of(found), str):
        raise ValueError(
            f"{what} is no method: it should be a subclass of sclcore.driver.method.Method that "
            'declares its name: name: Literal["mine"] = "mine"'
        )
    return found


def parse_method(given: Any) -> Method:
    """The `method:` section of a recipe, a mapping, as the method that it names.

    Raises pydantic's errors, whose places are keys of the section.
    """
    if isinstance(given, Method):
        return given
    name = given.get("name") if isinstance(given, dict) else given
    try:
        kind = find_method(str(name))
    except ValueError as error:
        raise PydanticCustomError("unknown_method", "{reason}", {"reason": str(error)}) from error
    if not isinstance(given, dict):
        raise PydanticCustomError("model_type", "should be a mapping")
    return kind.model_validate({**given, "name": name_of(kind)})
