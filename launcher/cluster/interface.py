"""The interface over which ranks reach each other: the way to the rendezvous leads over it.

Gloo listens at the address that the node's own name means, where it is told nothing else. On many a
node that is 127.0.1.1 (Debian writes it to /etc/hosts) or a network of administration, at which no
peer gets an answer.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from datetime import timedelta

import psutil
from torch._C._distributed_c10d import Store

from launcher.cluster.world import World

_VARIABLE = "GLOO_SOCKET_IFNAME"


def choose(world: World, store: Store, timeout: timedelta) -> None:
    """Let gloo use the interface over which this node reaches the others. Collective.

    `store` is that of the rendezvous. An interface that GLOO_SOCKET_IFNAME names is left alone.
    """
    own = own_address(world.master_addr, world.master_port)
    store.set(f"address/{world.rank}", own or "")
    if world.is_main:
        addresses = (store.get(f"address/{r}").decode() for r in range(1, world.world_size))
        store.set("peer", next((a for a in addresses if a and not _is_local(a)), ""))
    store.wait(["peer"], timeout)
    peer = store.get("peer").decode()
    # To the node of rank 0 its own name, or 127.0.0.1, leads over no network.
    if peer and (own is None or _is_local(own)):
        own = own_address(peer, world.master_port)
    if own and (name := _interface_with(own)):
        os.environ.setdefault(_VARIABLE, name)


def used() -> str:
    """The interfaces that gloo uses now, for a message."""
    return os.environ.get(_VARIABLE, "the interface of this node's name")


def own_address(host: str, port: int) -> str | None:
    """The address of this node from which it reaches `host`; None if it knows no way there."""
    with contextlib.suppress(OSError):
        ways = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, address in ways:
            # Asks the table of routes: nothing is sent.
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return probe.getsockname()[0].partition("%")[0]
    return None


def _is_local(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _interface_with(address: str) -> str | None:
    wanted = ipaddress.ip_address(address)
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            found = ipaddress.ip_address(one.address.partition("%")[0])
            # 127.0.1.1 is an address of the loopback interface, which names only 127.0.0.1.
            if found == wanted or (found.is_loopback and wanted.is_loopback):
                return name
    return None
