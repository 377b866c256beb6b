"""Training that begins again, from weights of an earlier moment or from its own."""

from __future__ import annotations

from collections.abc import Iterable

from sclcore.driver.net import Connected

_MOMENTA = ("momentum_buffer", "exp_avg")


def keep_weights(parameters: Iterable[Connected], key: str) -> None:
    """Keep the present weights as state, to come back to them with `put_back`."""
    for each in parameters:
        each.state[key] = each.param.detach().clone()


def put_back(parameters: Iterable[Connected], key: str) -> None:
    for each in parameters:
        each.param.copy_(each.state[key])


def forget(parameters: Iterable[Connected], key: str) -> None:
    for each in parameters:
        each.state.pop(key, None)


def rest(parameters: Iterable[Connected]) -> None:
    """Take all momentum away, as if training began.

    AdamW keeps its mean squares: the count of updates that corrects them goes on.
    """
    for each in parameters:
        for key in _MOMENTA:
            if key in each.state:
                each.state[key].zero_()
