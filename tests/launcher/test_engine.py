"""The engine's arithmetic; its behaviour is tested by real runs in test_train.py."""

from __future__ import annotations

import pytest

from launcher.errors import UsageError
from launcher.recipe.engine import accumulation_steps


@pytest.mark.parametrize(
    ("batch", "ranks", "fits", "steps"),
    [(64, 1, 64, 1), (64, 1, 63, 2), (64, 2, 8, 4), (96, 1, 20, 6), (7, 1, 3, 7)],
)
def test_accumulation_divides_evenly_and_fits(
    batch: int, ranks: int, fits: int, steps: int
) -> None:
    found = accumulation_steps(batch, ranks, fits)
    assert found == steps
    assert batch % (ranks * found) == 0
    assert batch // (ranks * found) <= fits


def test_a_batch_that_ranks_do_not_divide() -> None:
    with pytest.raises(UsageError, match=r"64 cannot be divided among 3 .*possible: 63 or 66"):
        accumulation_steps(64, 3, 256)


def test_more_ranks_than_samples_in_a_batch() -> None:
    with pytest.raises(UsageError, match="nearest possible: 8"):
        accumulation_steps(4, 8, 256)
