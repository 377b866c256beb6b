"""YAML as recipes are written in it."""

from __future__ import annotations

import re

import yaml


def where_and_why(error: Exception) -> str:
    """What is wrong with a text that is no YAML, and at which line and column of it."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return "it is not text in UTF-8"
    problem = getattr(error, "problem", None) or "something else was expected"
    hints = {
        "mapping values are not allowed": "a second colon; put text that has one in quotes",
        "'\\t'": "a tabulator; indent by blanks",
        "could not determine a constructor": "a tag (!…), which recipes have none of",
    }
    words = next((hint for part, hint in hints.items() if part in problem), problem)
    return f"line {mark.line + 1}, column {mark.column + 1}: {words}"


class Loader(yaml.SafeLoader):
    """Safe, and YAML 1.2 where 1.1 surprises: `off` and 2:4 are words, and 1e-3 is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own way to say it)
        first: [both for both in resolvers if not both[0].endswith((":bool", ":float", ":int"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# Before floats, whose pattern takes whole numbers as well.
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$|^0x[0-9a-fA-F]+$"),
    list("-+0123456789"),
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)
