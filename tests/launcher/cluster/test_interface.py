"""The interface that leads to the other ranks; between real hosts: test_hosts.py."""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import psutil
import pytest
from torch._C._distributed_c10d import HashStore

from launcher.cluster import interface
from launcher.cluster.world import World

VARIABLE = "GLOO_SOCKET_IFNAME"
LOOPBACK = next(
    name
    for name, addresses in psutil.net_if_addrs().items()
    if any(one.address == "127.0.0.1" for one in addresses)
)


def choose(store: HashStore, rank: int, size: int, host: str) -> None:
    interface.choose(World(rank, 0, size, host, 29500, "by hand"), store, timedelta(seconds=20))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1"])
def test_ranks_of_one_machine_meet_at_home(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "to be undone")
    monkeypatch.delenv(VARIABLE)
    store = HashStore()
    other = threading.Thread(target=choose, args=(store, 1, 2, host))
    other.start()
    choose(store, 0, 2, host)
    other.join(20)
    assert os.environ[VARIABLE] == LOOPBACK == interface.used()


def test_an_interface_that_is_named_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "ib0")
    choose(HashStore(), 0, 1, "127.0.0.1")
    assert interface.used() == "ib0"


def test_no_way_to_a_name_that_is_none() -> None:
    assert interface.own_address("127.0.0.1", 1) == "127.0.0.1"
    assert interface.own_address("no.such.host.invalid", 1) is None
