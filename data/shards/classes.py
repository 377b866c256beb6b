"""Classes that have numbers only: labels as names, and labels that cannot be numbers of classes."""

from __future__ import annotations

from data.errors import DataError

# No set has so many; dates, times and identifiers are beyond.
MOST_CLASSES = 1_000_000


def numbered_classes(count: int, where: str) -> list[str]:
    """The labels 0 to `count` - 1 as names of classes.

    Raises DataError where there would be too many, `where` being what holds such labels.
    """
    if count > MOST_CLASSES:
        raise DataError(
            f"{where} has the label {count - 1}, but labels count the classes from 0 on (at most "
            f"{MOST_CLASSES:,} classes); is this a date or an identifier? number the classes, or "
            "take the labels from elsewhere"
        )
    return [str(label) for label in range(count)]
