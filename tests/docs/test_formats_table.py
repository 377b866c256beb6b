"""docs/formats.md: the published sizes, and what they are on random matrices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import formats_table
from docs.formats_table import PUBLISHED, line

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "formats.md"


def test_the_table_has_every_published_row() -> None:
    text = DOCUMENT.read_text()
    for row in PUBLISHED:
        found = re.search(
            rf"\| {row.data} \| {row.setting} \| \S+ \| {row.published:g} \| (\S+) ", text
        )
        assert found, row
        # What their code counts: two digits were published. One row is no size of the format that
        # the paper names; docs/formats.md says so.
        if row.setting != "Pr 96 WS 128-32-32":
            assert float(found[1]) == pytest.approx(row.published, rel=0.06)


def test_a_row_on_small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 % live with two values: 1 bit of codeword and 16 of index for each, 16 for each row."""
    monkeypatch.setattr(formats_table, "SHAPES", ((400, 500),))
    monkeypatch.setattr(formats_table, "SIZE", 200_000)
    row = formats_table.Row("none", 84, "pq", (2,), "sham", 1.0)
    file = line(row).split(" | ")[-1]
    expected = (32_000 * 17 + 400 * 16) / (32 * 200_000)
    # The line is rounded to four digits; the dictionary has a dozen bytes.
    assert float(file.strip(" |")) == pytest.approx(expected, abs=1e-4)
