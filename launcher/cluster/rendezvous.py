"""Where the ranks of a run meet: a store that rank 0 keeps at MASTER_ADDR:MASTER_PORT.

Whoever reaches the store can speak to the ranks as one of them, so it listens no further than it
was told to: at an address, such as the 127.0.0.1 of `scl train`, at that alone. Only where
MASTER_ADDR is a name does it listen at all of the node's addresses: to the node itself, its name
often means another address than to its peers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from launcher.cluster import interface
from launcher.cluster.process import ends_after
from launcher.cluster.world import World, attempt
from launcher.errors import RunError, UsageError, UserError
from launcher.terminal import Pace, Waiting, say

_POLL_S = 0.02
_SHOWN = 8
_REFUSED = "refused"
# What rank 0 leaves where each rank says that it is here: nothing, or why it will not train.
_RANK_0 = "here/0"
_TURNED_AWAY = "turned-away"
# How long rank 0 stays to say that it will not train.
_OTHERS_COME_WITHIN_S = 10.0
# How much later than a rank that is refused rank 0 may start, and how long until it is ready.
_STARTS_WITHIN_S = 30.0
REFUSES_WITHIN_S = 120.0
_ANSWERS_WITHIN_S = 5.0


def join(world: World, backend: str, device: torch.device, timeout: timedelta) -> None:
    """Make torch's process group of all ranks, this one's on `device`. Collective.

    Raises RunError when rank 0, or another, is not there in time, UsageError when one was refused.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        with _waiting_for_rank_0(world, timeout):
            if not world.is_main:
                wait_listening(world, deadline)
            left = max(_ANSWERS_WITHIN_S, deadline - time.monotonic())
            with ends_after(left, _not_rank_0(world)):
                store = PrefixStore(f"ranks/{attempt()}", open_store(world, timeout))
    except (OSError, dist.DistNetworkError) as error:
        raise RunError(
            f"nobody answers at {world.master_addr}, port {world.master_port} "
            f"({_reason(error)}): rank 0 has ended or did not start, and its output says why, or "
            "MASTER_ADDR and MASTER_PORT do not lead to it from here"
        ) from error
    try:
        _wait_for_all(world, store, timeout)
        interface.choose(world, store, timeout)
        with ends_after(timeout.total_seconds(), _no_connection(world, "no answer")):
            dist.init_process_group(
                backend,
                store=store,
                rank=world.rank,
                world_size=world.world_size,
                timeout=timeout,
                # NCCL connects at once then, not in the first collective.
                device_id=device if device.type == "cuda" and world.world_size > 1 else None,
            )
    except dist.DistStoreError as error:
        raise RunError(
            f"not all {world.world_size} ranks came to {world.master_addr}, port "
            f"{world.master_port}, within {timeout.total_seconds():.0f} s: one has ended or did "
            "not start, and its output says why"
        ) from error
    except dist.DistNetworkError as error:
        raise RunError(
            f"rank 0, which keeps the rendezvous at {world.master_addr}, port "
            f"{world.master_port}, has ended, and its output says why"
        ) from error
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise RunError(_no_connection(world, _reason(error))) from error


def begin(world: World) -> World:
    """`world`, where rank 0 listens from now on: whoever comes before it is ready waits for that.

    Raises UsageError when it cannot listen there.
    """
    if world.listening is not None or world.world_size == 1 or not _keeps_the_store(world):
        return world
    return replace(world, listening=listen(world.master_addr, world.master_port))


def refuse(world: World, error: UserError) -> threading.Thread:
    """Let rank 0, which waits for this rank or will soon, know why it does not come.

    Without it, rank 0 would wait for `engine.timeout_s`, and say nothing of the cause. Returns the
    thread that tries to, which ends at once where rank 0 does.
    """
    sentence = f"rank {world.rank} on {socket.gethostname()}: {error}"

    def tell() -> None:
        with contextlib.suppress(OSError, RuntimeError):
            wait_listening(world, time.monotonic() + _STARTS_WITHIN_S)
            limit = timedelta(seconds=REFUSES_WITHIN_S)
            store = PrefixStore(f"ranks/{attempt()}", open_store(world, limit))
            store.set(_REFUSED, json.dumps([error.exit_code, sentence]))
            store.set(f"{_REFUSED}/{world.rank}", "")

    thread = threading.Thread(target=tell, name="refusal", daemon=True)
    thread.start()
    return thread


def turn_away(world: World, error: UserError) -> None:
    """Let the others, which wait for rank 0 or will soon, know why it does not train.

    Without it, one that comes when rank 0 has ended would wait for `engine.timeout_s`. Returns when
    all have been told, or were refused themselves, or have not come within a few seconds; at once
    where rank 0 has met them already, or a launcher keeps the store, which outlives rank 0.
    """
    if world.listening is None or world.listening.fileno() < 0 or not _keeps_the_store(world):
        return
    sentence = f"rank 0 on {socket.gethostname()}: {error}"
    deadline = time.monotonic() + _OTHERS_COME_WITHIN_S
    left = [*range(1, world.world_size)]
    with contextlib.suppress(OSError, RuntimeError, UserError):
        kept = open_store(world, timedelta(seconds=_OTHERS_COME_WITHIN_S))
        store = PrefixStore(f"ranks/{attempt()}", kept)
        store.set(_RANK_0, json.dumps([error.exit_code, sentence]))
        while left and time.monotonic() < deadline:
            if any(store.check([f"{key}/{left[0]}"]) for key in (_TURNED_AWAY, _REFUSED)):
                del left[0]
            else:
                time.sleep(_POLL_S)


def wait_listening(world: World, deadline: float) -> None:
    """Wait until somebody listens at the rendezvous. Raises OSError with what is in the way.

    The store's own attempts outlast its time-out twice, and hide why.
    """
    while True:
        try:
            left = max(_POLL_S, deadline - time.monotonic())
            socket.create_connection((world.master_addr, world.master_port), timeout=left).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(5 * _POLL_S)


def _waiting_for_rank_0(world: World, timeout: timedelta) -> contextlib.AbstractContextManager:
    """Says that rank 0 is waited for; one rank of each machine does."""
    if world.is_main or world.local_rank > 1 or (world.local_rank == 1 and world.rank > 1):
        return contextlib.nullcontext()
    return Waiting(
        f"rank {world.rank} waits for rank 0 at {world.master_addr}, port {world.master_port}",
        f", at most {timeout.total_seconds():.0f} s (engine.timeout_s)",
    )


def _wait_for_all(world: World, store: PrefixStore, timeout: timedelta) -> None:
    """Let all wait for rank 0, and it for the others, saying now and then for whom. Collective.

    Raises RunError when some are not there in time, UsageError when one was refused.
    """
    store.set(f"here/{world.rank}", "")
    if not world.is_main:
        # Waits until it is there: the store may be before rank 0 has said anything.
        if reason := store.get(_RANK_0):
            store.set(f"{_TURNED_AWAY}/{world.rank}", "")
            raise _refusal(reason)
        return
    missing = [*range(1, world.world_size)]
    pace, limit = Pace(), timeout.total_seconds()
    where = f"{world.master_addr}, port {world.master_port}"
    while missing:
        if store.check([_REFUSED]):
            raise _refusal(store.get(_REFUSED))
        if store.check([f"here/{missing[0]}"]):
            del missing[0]
            continue
        is_over = pace.seconds > limit
        if is_over or pace.is_due():
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        elif missing:
            time.sleep(_POLL_S)
            continue
        if missing and is_over:
            raise RunError(
                f"not all {world.world_size} ranks came to {where}, within {limit:.0f} s: "
                f"{_ranks(missing)} did not start, or ended, and its output says why"
            )
        if missing:
            say(
                f"waiting for {_ranks(missing)} of {world.world_size} at {where}: "
                f"{pace.seconds:.0f} s so far, at most {limit:.0f} s (engine.timeout_s)"
            )


def _refusal(written: bytes) -> UserError:
    code, sentence = json.loads(written)
    return (UsageError if code == UsageError.exit_code else RunError)(sentence)


def _not_rank_0(world: World) -> str:
    return (
        f"what listens at {world.master_addr}, port {world.master_port} does not answer rank "
        f"{world.rank} as rank 0 does: another program has the port, so choose another with "
        "MASTER_PORT, or rank 0 is not ready yet, as its output says"
    )


def _no_connection(world: World, reason: str) -> str:
    return (
        f"rank {world.rank} on {socket.gethostname()} cannot connect to the other ranks over "
        f"{interface.used()} ({reason}): one has just ended, a firewall is between, or another "
        "interface reaches them: name it with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    )


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def open_store(world: World, timeout: timedelta) -> TCPStore:
    """The common store; rank 0 keeps it, unless torchrun does.

    Raises UsageError when rank 0 cannot listen there, RuntimeError when nobody does within
    `timeout`.
    """
    address = (world.master_addr, world.master_port)
    if not _keeps_the_store(world):
        return TCPStore(*address, is_master=False, timeout=timeout, wait_for_workers=False)
    listening = world.listening or listen(*address)
    return TCPStore(
        *address,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def _keeps_the_store(world: World) -> bool:
    return world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at `host`, at any free port where `port` is 0. Raises UsageError."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        host, version = "", 6 if socket.has_dualstack_ipv6() else 4
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=8192, dualstack_ipv6=not host and version == 6
        )
    except OSError as error:
        raise UsageError(
            f"rank 0 cannot listen at {host or 'any address'}, port {port} ({error.strerror}): if "
            "the port is taken, choose another with MASTER_PORT; MASTER_ADDR must be an address "
            "or the name of rank 0's node"
        ) from error
