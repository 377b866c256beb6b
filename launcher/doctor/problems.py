"""What is wrong with a set of nodes, from what their ranks found: comparisons, and nothing else."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

from launcher.doctor.node_facts import Facts, Reply

# From here on, lines of two logs cannot be put in order any more; nothing breaks.
CLOCK_WARNING_S = 1.0
# From here on, nobody keeps the clock right. At some minutes, munge and object stores refuse.
CLOCK_ERROR_S = 30.0
MIN_FREE_GIB = 1.0


def problems(
    facts: Sequence[Facts], replies: Mapping[int, Reply], clock: float, world_size: int
) -> list[str]:
    """Sentences of what is wrong, where, and how to mend it; empty when the run can start.

    `facts` are of the ranks that came, `replies` of those that answered rank 0's go, sent at the
    Unix time `clock`.
    """
    return [
        *_absent(facts, world_size),
        *_own_errors(facts),
        *_different(facts),
        *_shared_gpus(facts),
        *_folder(facts, replies),
        *_clocks(facts, replies, clock, more_than=CLOCK_ERROR_S),
    ]


def remarks(facts: Sequence[Facts], replies: Mapping[int, Reply], clock: float) -> list[str]:
    """What is worth knowing and stops nothing."""
    return [
        text
        for text in _clocks(facts, replies, clock, more_than=CLOCK_WARNING_S)
        if text not in _clocks(facts, replies, clock, more_than=CLOCK_ERROR_S)
    ]


def ranks(numbers: Iterable[int]) -> str:
    """The ranks of `numbers`, in any order, in words: `ranks 0–7, 9`, or `rank 3`."""
    ordered = sorted(numbers)
    spans: list[list[int]] = []
    for number in ordered:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in spans)
    return f"rank{'s' if len(ordered) > 1 else ''} {text}"


def where(facts: Iterable[Facts]) -> str:
    """The nodes and ranks of `facts` in words: `n1 (rank 1), n2 (ranks 2–3)`."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for fact in facts:
        by_host[fact.host].append(fact.rank)
    return ", ".join(f"{host} ({ranks(numbers)})" for host, numbers in by_host.items())


def _absent(facts: Sequence[Facts], world_size: int) -> Iterator[str]:
    missing = set(range(world_size)) - {fact.rank for fact in facts}
    if missing:
        yield (
            f"{ranks(missing)} of {world_size} did not come; those here: {where(facts)}. Look in "
            "the log for what they said; if nothing, their node is down, or cannot reach the "
            "address and port of the rendezvous (MASTER_ADDR, MASTER_PORT): a firewall, or the "
            "name leads to another network"
        )


def _own_errors(facts: Sequence[Facts]) -> Iterator[str]:
    by_text: dict[str, list[Facts]] = defaultdict(list)
    for fact in facts:
        for text in fact.errors:
            by_text[text].append(fact)
    for text, affected in by_text.items():
        yield f"{where(affected)}: {text}"
    little = [f for f in facts if f.free_gib is not None and f.free_gib < MIN_FREE_GIB]
    if little:
        yield (
            f"{where(little)}: less than {MIN_FREE_GIB:g} GiB is free where the run is to be "
            "written: make room, or choose another run_dir"
        )


def _different(facts: Sequence[Facts]) -> Iterator[str]:
    names = sorted({name for fact in facts for name in fact.versions})
    for name in names:
        yield from _odd_ones(
            facts,
            lambda fact, name=name: fact.versions.get(name),
            name,
            "let all nodes use one environment and one checkout (SCL_VENV on a shared file "
            "system, or SCL_CONTAINER)",
        )
    yield from _odd_ones(
        [fact for fact in facts if fact.data],
        lambda fact: fact.data,
        "data with the manifests",
        "copy the shards anew to that node, or point data.path at a shared folder",
    )
    yield from _odd_ones(
        facts,
        lambda fact: "GPU" if fact.gpu else "CPU",
        "ranks on the",
        "look at nvidia-smi on that node, or at DS_ACCELERATOR",
    )
    yield from _odd_ones(
        [fact for fact in facts if fact.driver],
        lambda fact: fact.driver,
        "the NVIDIA driver",
        "take nodes of one partition, or exclude that node (sbatch --exclude)",
    )


def _odd_ones(
    facts: Sequence[Facts], key: Callable[[Facts], Hashable], what: str, remedy: str
) -> Iterator[str]:
    """One sentence for each value that is not the commonest; of two, that of rank 0 is."""
    counts = Counter(map(key, facts))
    if len(counts) < 2:
        return
    usual = max(counts, key=lambda value: (counts[value], value == key(facts[0])))
    for value in counts:
        if value != usual:
            odd = where(fact for fact in facts if key(fact) == value)
            yield f"{odd}: {what} {value}, others have {usual}: {remedy}"


def _shared_gpus(facts: Sequence[Facts]) -> Iterator[str]:
    users: dict[tuple[str, str], list[Facts]] = defaultdict(list)
    for fact in facts:
        if fact.gpu:
            users[fact.host, fact.gpu].append(fact)
    for sharing in users.values():
        if len(sharing) > 1:
            yield (
                f"{where(sharing)}: {len(sharing)} ranks would share one GPU: ask for a GPU per "
                "task (--gpus-per-node as large as --ntasks-per-node)"
            )


def _folder(facts: Sequence[Facts], replies: Mapping[int, Reply]) -> Iterator[str]:
    blind = [f for f in facts if f.rank in replies and not replies[f.rank].sees_token]
    if blind:
        yield (
            f"{where(blind)}: the run's folder is not the one that rank 0 writes to: choose a "
            "run_dir (SCL_RUNS) on a file system that all nodes share"
        )
    for fact in facts:
        reply = replies.get(fact.rank)
        if reply is not None and reply.write_error:
            yield (
                f"{where([fact])}: cannot write to the run's folder ({reply.write_error}): mend "
                "its permissions, or choose another run_dir (SCL_RUNS)"
            )


def _clocks(
    facts: Sequence[Facts], replies: Mapping[int, Reply], clock: float, *, more_than: float
) -> list[str]:
    return [
        f"{where([fact])}: the clock differs by {replies[fact.rank].clock - clock:+.1f} s from "
        "that of rank 0: let the node keep the time (chrony, ntpd)"
        for fact in facts
        if fact.rank in replies and abs(replies[fact.rank].clock - clock) > more_than
    ]
