"""docs/training.md has the table of what `benchmarks.additions` has run."""

from __future__ import annotations

from pathlib import Path

from docs.figures.additions import lines_of, table

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_the_document_shows_what_the_csv_file_says() -> None:
    assert table(lines_of("digits")) in DOCUMENT.read_text()
