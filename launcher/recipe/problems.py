"""What is wrong with a recipe, as one sentence that names the key and what to write instead."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from launcher.recipe.keys import Key, all_keys, all_sections, key_at, sections
from launcher.recipe.kinds import choices_of, is_list, joined, kind_of, written

_OWN_WORDS = ("value_error", "assertion_error", "unknown_method")
# What other programs call it.
_ALSO_CALLED = {
    "learning_rate": "optim.lr",
    "batch_size": "optim.global_batch_size",
    "num_epochs": "optim.epochs",
    "wd": "optim.weight_decay",
    "optimizer": "optim.name",
    "arch": "model.name",
    "dataset": "data.path",
    "data_dir": "data.path",
    "num_workers": "data.workers",
    "img_size": "data.image_size",
    "gpus": "engine.ranks",
    "amp": "engine.precision",
    "density": "method.target_density",
    "sparsity": "method.target_density",
    "pretrained": "init.weights",
    "resume": "checkpoint.resume",
    "output_dir": "run_dir",
}


def sentence(error: ValidationError, method: str | None = None) -> str:
    """The first problem of a recipe of `method` as a sentence, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    location = [str(part) for part in first["loc"]]
    method = method if location[:1] == ["method"] else None
    text = _sentence(first["type"], location, method, first["msg"], first.get("input"))
    # A key that may hold this or that is complained of once for each.
    keys = [key_at([*map(str, p["loc"])], method) or p["loc"] for p in problems]
    more = len([k for n, k in enumerate(keys) if k not in keys[:n]]) - 1
    return text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def phrase(problem: Any, model: type[BaseModel], name: str | None) -> str:
    """One of pydantic's problems with another file of ours, where field `name` of `model` is."""
    key = ".".join(map(str, problem["loc"]))
    field = model.model_fields.get(name or "")
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    if problem["type"] in _OWN_WORDS or field is None:
        reason = _own_words(problem["msg"])
        return f"{key}: {reason}" if key else reason
    return f"{key}: should be {kind_of(field)}, not {shown(problem.get('input'))}"


def shown(value: Any) -> str:
    """A value somebody gave; what a mapping holds is not shown: there may be a key of W&B's."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, str):
        return repr(value)
    return written(value) if isinstance(value, int | float | list | tuple | None) else "this"


def _sentence(kind: str, location: list[str], method: str | None, reason: str, given: Any) -> str:
    name = ".".join(location)
    if kind == "extra_forbidden":
        return f"unknown key {name!r}{_hint(location, method)}"
    key = key_at(location, method)
    if kind == "missing" and (key is None or key.path == name):
        example = "" if key is None or key.example is None else f"; write {_setting(key)}"
        return f"the key {name!r} is missing{example}"
    if kind in _OWN_WORDS:
        words = _own_words(reason)
        if kind == "unknown_method" or not location:
            return words
        return f"{name}: {words}" + ("" if isinstance(given, dict) else f", not {shown(given)}")
    if key is not None:
        return _of_key(key, given)
    found = [section for section in all_sections() if section.path == name]
    if found:
        has_name = f"{name}.name" in _paths() and isinstance(given, str | int | float)
        write = f"; write {name}.name={given}" if has_name else ""
        null = " or null" if found[0].optional else ""
        return f"{name}: should be a mapping of keys to values{null}, not {shown(given)}{write}"
    return f"{name}: is not understood: {shown(given)}"


def _of_key(key: Key, given: Any) -> str:
    last = key.path.rpartition(".")[2]
    text = f"{key.path}: should be {key.kind}, not {shown(given)}"
    plain = isinstance(given, str | int | float) and not isinstance(given, bool)
    if is_list(key.field.annotation):
        if plain and "numbers" not in key.kind:
            return f"{text}; write {last}: [{given}]"
        return text if key.example in (None, [], ()) else f"{text}; such as {_setting(key)}"
    if choices := [*map(str, choices_of(key.field.annotation))]:
        close = difflib.get_close_matches(str(given), choices, n=1, cutoff=0.6)
        return f"{text}; did you mean {close[0]}?" if close else text
    # What is a number, but out of bounds, needs no example of one.
    if (isinstance(given, str) or given is None) and key.example not in (None, "", [], {}):
        return f"{text}; such as {_setting(key)}"
    return text


def _setting(key: Key) -> str:
    return f"{key.path.rpartition('.')[2]}: {written(key.example)}"


def _own_words(reason: str) -> str:
    reason = reason.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return reason[0].lower() + reason[1:]


def _hint(location: list[str], method: str | None) -> str:
    """What an unknown key may have meant: a key of the same block, else of another."""
    name, path = location[-1], ".".join(location)
    known = _paths()
    owners = known.get(path, ())
    if method and owners:
        return f" with method.name {method}: it is of {joined(owners, 'and')}"
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
    if name.lower() in _ALSO_CALLED:
        return f"; did you mean {_ALSO_CALLED[name.lower()]!r}?"
    last = {path.rpartition(".")[2]: path for path in known}
    if close := difflib.get_close_matches(name, last, n=1, cutoff=0.8):
        return f"; did you mean {last[close[0]]!r}?"
    if close := difflib.get_close_matches(name, here, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    return f"; valid here: {', '.join(here)}"


def _paths() -> dict[str, tuple[str, ...]]:
    """Every dotted path with the methods that have it (none: it is no method's), in order."""
    found: dict[str, tuple[str, ...]] = {}
    for item in (*sections(), *all_keys()):
        if item.path != "method" and item.method is not None:
            found[item.path] = (*found.get(item.path, ()), item.method)
        else:
            found.setdefault(item.path, ())
    return found
