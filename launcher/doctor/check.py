"""`scl doctor --cluster`: whether a run could start on these nodes, found out in a minute.

Every rank looks at its node; rank 0 collects, compares and prints. Nothing waits for ever: what
takes longer than the time-out is named, and the process ends.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch._C._distributed_c10d import PrefixStore

from launcher.cluster import interface
from launcher.cluster.accelerator import accelerator
from launcher.cluster.process import ends_after
from launcher.cluster.rendezvous import open_store, wait_listening
from launcher.cluster.world import World
from launcher.doctor.node_facts import Facts, Reply, find_facts, place_token, reply_to, to_json
from launcher.doctor.problems import problems, remarks
from launcher.doctor.problems import ranks as name_ranks
from launcher.errors import UsageError
from launcher.recipe.recipe import Recipe
from launcher.terminal import say

_POLL_S = 0.1
_GRACE_S = 10.0
# 32 MiB of float32: about the gradient of a ResNet-18, large enough for bandwidth to tell.
_REDUCED_FLOATS = 8 * 2**20
_REDUCED_TIMES = 3


@dataclass(frozen=True)
class Findings:
    """What rank 0 knows at the end. `bandwidth`: bytes all-reduced per second; None: not run."""

    facts: list[Facts]
    replies: dict[int, Reply]
    clock: float
    bandwidth: float | None


def check_cluster(recipe: Recipe, world: World, timeout_s: float) -> int:
    """Check this rank's node and, with the others, all of them; rank 0 prints. Collective.

    Returns 0 when a run could start, else 1.
    """
    deadline = time.monotonic() + timeout_s
    limit = timeout_s + _GRACE_S
    too_long = (
        f"rank {world.rank}: the check of this node took longer than {limit:.0f} s, so something "
        "on it hangs"
    )
    with ends_after(limit, too_long):
        facts = find_facts(world, recipe)
        try:
            store = _join(world, deadline)
        except (UsageError, RuntimeError, OSError) as error:
            for text in (_no_rendezvous(world, error), *facts.errors):
                say(f"error: rank {world.rank} on {facts.host}: {text}")
            return 1
        store.set(f"facts/{world.rank}", to_json(facts))
        if world.is_main:
            return _lead(recipe, world, store, deadline)
        return _follow(world, store, deadline)


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(1.0, deadline - time.monotonic()))


def _join(world: World, deadline: float) -> PrefixStore:
    """Raises UsageError, RuntimeError or OSError when there is no rendezvous in time."""
    if not world.is_main:
        wait_listening(world, deadline)
    return PrefixStore("doctor", open_store(world, _left(deadline)))


def _lead(recipe: Recipe, world: World, store: PrefixStore, deadline: float) -> int:
    arrived = _collect(store, "facts", range(world.world_size), deadline)
    facts = [Facts(**{**values, "errors": tuple(values["errors"])}) for values in arrived.values()]
    complete = len(facts) == world.world_size
    with _token(recipe.folder) as (token, unwritable):
        clock = time.time()
        store.set("go", json.dumps({"token": token and str(token), "all": complete}))
        bandwidth = _take_part(world, store, token, complete, deadline)
        soon = time.monotonic() + _GRACE_S / 2
        answers = _collect(store, "reply", arrived, soon)
    replies = {rank: Reply(**values) for rank, values in answers.items() if token}
    findings = Findings(facts, replies, clock, bandwidth)
    wrong = problems(facts, replies, clock, world.world_size) + unwritable
    if bandwidth is None and complete and world.world_size > 1:
        wrong.append("the ranks cannot reduce together: see the errors above")
    show(findings, wrong, world)
    store.set("verdict", str(int(bool(wrong))))
    # The store goes with this process: the others ask it once more.
    _collect(store, "bye", [rank for rank in arrived if rank], time.monotonic() + _GRACE_S / 2)
    return int(bool(wrong))


def _follow(world: World, store: PrefixStore, deadline: float) -> int:
    try:
        store.wait(["go"], _left(deadline + _GRACE_S))
        go = json.loads(store.get("go"))
        token = Path(go["token"]) if go["token"] else None
        _take_part(world, store, token, go["all"], deadline)
        store.wait(["verdict"], _left(deadline + _GRACE_S))
        code = int(store.get("verdict"))
        store.set(f"bye/{world.rank}", "{}")
    except RuntimeError as error:
        say(f"error: rank {world.rank}: rank 0 does not answer ({_first_line(error)})")
        return 1
    return code


def _take_part(
    world: World, store: PrefixStore, token: Path | None, complete: bool, deadline: float
) -> float | None:
    """What all ranks do when rank 0 has said go; the bandwidth of an all-reduce in bytes/s."""
    store.set(f"reply/{world.rank}", to_json(reply_to(token)))
    if not complete or world.world_size == 1:
        return None
    device, backend = torch.device("cpu"), "gloo"
    if accelerator() == "cuda":
        device, backend = torch.device("cuda", world.local_rank % torch.cuda.device_count()), "nccl"
        torch.cuda.set_device(device)
    try:
        interface.choose(world, store, _left(deadline))
        dist.init_process_group(
            backend,
            store=PrefixStore(backend, store),
            rank=world.rank,
            world_size=world.world_size,
            timeout=_left(deadline),
        )
        rate = _measure(device)
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        say(
            f"error: rank {world.rank} cannot talk to the others by {backend} over "
            f"{interface.used()} ({_first_line(error)}): name the interface that reaches them "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        )
        return None
    return rate


def _measure(device: torch.device) -> float:
    values = torch.ones(_REDUCED_FLOATS, device=device)
    dist.all_reduce(values)
    began = time.perf_counter()
    for _ in range(_REDUCED_TIMES):
        dist.all_reduce(values)
    # Waits for the device.
    values[0].item()
    return values.nbytes * _REDUCED_TIMES / (time.perf_counter() - began)


def _collect(
    store: PrefixStore, kind: str, ranks: Iterable[int], deadline: float
) -> dict[int, dict]:
    """What `ranks` have put under `kind`, as far as it is there in time."""
    wanted = list(ranks)
    absent = set(wanted)
    while True:
        absent = {rank for rank in absent if not store.check([f"{kind}/{rank}"])}
        if not absent or time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    return {r: json.loads(store.get(f"{kind}/{r}")) for r in wanted if r not in absent}


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[tuple[Path | None, list[str]]]:
    """A token in the run's folder, or what prevents one; nothing of it stays."""
    token, problem = None, []
    try:
        token = place_token(folder.absolute())
    except OSError as error:
        problem = [
            f"rank 0 cannot write to {folder} ({error.strerror}): mend its permissions, or "
            "choose another run_dir (SCL_RUNS)"
        ]
    try:
        yield token, problem
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
            # Only where it was made for the token.
            with contextlib.suppress(OSError):
                folder.rmdir()


def show(findings: Findings, wrong: list[str], world: World) -> None:
    """The nodes as a table, then what is wrong with them."""
    console = Console(highlight=False, soft_wrap=True)
    first = findings.facts[0]
    count = len({fact.host for fact in findings.facts})
    alone = world.source == "single process"
    started = "no launcher, so this machine alone" if alone else world.source
    console.print(
        f"{len(findings.facts)} of {world.world_size} rank(s) on {count} node(s), started by: "
        f"{started}; rendezvous at {world.master_addr}:{world.master_port}"
    )
    console.print(", ".join(f"{name} {version}" for name, version in first.versions.items()))
    console.print(_table(findings))
    if findings.bandwidth is not None:
        console.print(f"all-reduce of 32 MiB: {findings.bandwidth / 1e9:.2f} GB/s")
    for text in remarks(findings.facts, findings.replies, findings.clock):
        console.print(f"remark: {escape(text)}")
    for text in wrong:
        console.print(f"problem: {escape(text)}")
    if not wrong:
        console.print("nothing is wrong: a run can start here")


def _table(findings: Findings) -> Table:
    table = Table()
    for name in ("node", "ranks", "device", "data", "free", "folder", "clock"):
        table.add_column(name)
    nodes: dict[tuple, list[Facts]] = {}
    for fact in findings.facts:
        nodes.setdefault((fact.host, fact.device, fact.data, bool(fact.errors)), []).append(fact)
    for node in nodes.values():
        first = node[0]
        reply = findings.replies.get(first.rank)
        table.add_row(
            first.host,
            name_ranks(f.rank for f in node).partition(" ")[2],
            escape(first.device),
            first.data or "–",
            "–" if first.free_gib is None else f"{first.free_gib:,.0f} GiB",
            "–" if reply is None else ("shared" if reply.sees_token else "another"),
            "–" if reply is None else f"{reply.clock - findings.clock:+.2f} s",
        )
    return table


def _no_rendezvous(world: World, error: Exception) -> str:
    if world.is_main:
        return _first_line(error)
    return (
        f"cannot reach rank 0 at {world.master_addr}:{world.master_port} ({_first_line(error)}): "
        "rank 0 did not start, a firewall is between, or the name leads to another network "
        "(MASTER_ADDR)"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
