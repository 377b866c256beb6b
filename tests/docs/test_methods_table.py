"""docs/methods.md: the table is what the methods say of themselves, and each has a section."""

from __future__ import annotations

import re

from docs.methods_table import BEGIN, DOCUMENT, END, table
from sclcore.registry import known_methods


def test_the_table_is_that_of_the_classes() -> None:
    text = DOCUMENT.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == table()


def test_every_method_has_a_section() -> None:
    assert re.findall(r"(?m)^## (\w+)$", DOCUMENT.read_text()) == sorted(known_methods())
