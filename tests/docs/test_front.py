"""docs/comparison.md has the tables of what `benchmarks.front` has run."""

from __future__ import annotations

from pathlib import Path

from benchmarks.front_lines import read
from docs.figures.front import TASKS, gap_table, lines_of, spread_table

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "comparison.md"


def test_the_document_shows_what_the_csv_files_say() -> None:
    text = DOCUMENT.read_text()
    for task in TASKS:
        every = read(DOCUMENT.parent / "figures" / "front" / f"{task}.csv")
        assert spread_table(every) in text
        assert gap_table(lines_of(task)) in text
