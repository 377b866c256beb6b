"""Courses that methods share."""

from __future__ import annotations

import pytest

from sclcore.courses import again, reached


def test_a_schedule_that_begins_again_is_gone_through_once_between_each_two_places() -> None:
    places = [0.0, 0.2, 0.5]
    found = [again(p, places) for p in (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([0, 0.5, 0, 0.5, 0, 0.5, 1])


def test_after_the_first_time_it_may_begin_later() -> None:
    places = [0.0, 0.5]
    found = [again(p, places, first=0.2) for p in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([0, 0.2, 0.5, 0.2, 0.6, 1])


@pytest.mark.parametrize("count", [3, 7, 49])
def test_places_that_were_added_up_are_reached_at_their_update(count: int) -> None:
    """Of 2,401 updates: 1/3 and the like are no float, nor are the sums of such steps."""
    places = [0.0]
    for _ in range(count - 1):
        places.append(places[-1] + 1 / count)
    updates = [-(-2401 * i // count) for i in range(count)]
    for place, update in zip(places, updates, strict=True):
        assert reached(update / 2401, place)
        assert not reached((update - 1) / 2401, place)
        assert again(update / 2401, places) < count / 2401 + 1e-9
