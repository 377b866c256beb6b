"""docs/comparison.md has the tables of what `benchmarks.front` has run."""

from __future__ import annotations

from pathlib import Path

from docs.figures.front import TASKS, gap_table, lines_of, spread_table, whole

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "comparison.md"


def test_the_document_shows_what_the_csv_files_say() -> None:
    text = DOCUMENT.read_text()
    for task in TASKS:
        lines = lines_of(task)
        assert spread_table(lines) in text
        assert gap_table(whole(lines)) in text
