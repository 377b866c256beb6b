"""What of a data set is not packed: counted and named, and past a share refused."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from data.errors import DataError

DEFAULT_SHARE = 0.01
_SHOWN = 3


@dataclass(frozen=True)
class LeftOut:
    """Things that were left out for one reason.

    `names` are the first of them. `images` of them would have been samples, had they been taken.
    """

    why: str
    names: list[str]
    count: int
    images: int

    def __str__(self) -> str:
        return f"left out {self.count:,} {self.why}: {some(self.names, self.count)}"


def some(names: list[str], count: int | None = None) -> str:
    """The first few of `count` names, as one reads a list."""
    rest = (len(names) if count is None else count) - len(names[:_SHOWN])
    return ", ".join(names[:_SHOWN]) + (f" and {rest:,} more" if rest else "")


class Collector:
    """Takes note of what is left out, one thing after the other."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)
        self._images: dict[str, int] = defaultdict(int)

    def add(self, why: str, name: str, *, images: int = 0) -> None:
        """Note one thing; `images` is how many samples are lost with it."""
        if len(self._names[why]) < _SHOWN:
            self._names[why].append(name)
        self._counts[why] += 1
        self._images[why] += images

    def listed(self) -> list[LeftOut]:
        return [
            LeftOut(why, names, self._counts[why], self._images[why])
            for why, names in self._names.items()
        ]


def check_share(where: str, taken: int, left_out: list[LeftOut], allowed: float) -> None:
    """Raise DataError where more than the share `allowed` of the images would be left out."""
    if not 0 <= allowed <= 1:
        raise DataError(f"--leave-out is {allowed:g}; it must lie between 0 and 1")
    images = sum(kind.images for kind in left_out)
    if not images or images <= allowed * (taken + images):
        return
    reasons = "; ".join(
        f"{kind.images:,} {kind.why}, {some(kind.names, kind.count)}"
        for kind in left_out
        if kind.images
    )
    raise DataError(
        f"of {taken + images:,} images in {where} {images:,} would be left out ({reasons}); make "
        f"them readable, or leave them out with --leave-out {_share(images, taken + images)}"
    )


def _share(part: int, whole: int) -> str:
    """The smallest number of two digits that is a large enough share."""
    return f"{-(-100 * part // whole) / 100:g}"
