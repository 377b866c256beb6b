"""Runs that differ in nothing but their seed are one configuration: its means, and what sets it
apart from the others.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.compare.entries import read_entries
from launcher.compare.entry import Entry
from launcher.compare.pareto import pareto_front
from launcher.folder.results import ReportError
from sclcore.registry import known_methods

# Keys that do not make a run another configuration: its name, and how it is recorded and kept.
_IDENTITY = ("name", "run_dir", "seed", "tracking", "checkpoint")
MISSING = "–"

SORTS = {
    "density": ("density", -1),
    "top1": ("top1", -1),
    "macs": ("macs", -1),
    "time": ("train_seconds", 1),
    "throughput": ("images_per_s", -1),
}
"""Order of the lines → (statistic, 1 for ascending or -1 for descending)."""


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation of `n` runs; `std` is None for a single one."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Configuration:
    """The runs of one recipe; `settings` is what they have in common of it, flat.

    `runs` are those its numbers are means of: the finished ones; where none has finished yet, all
    of them, at their latest.
    """

    name: str
    method: str
    settings: dict[str, Any]
    runs: list[Entry]
    unfinished: list[Entry]

    @property
    def finished(self) -> bool:
        return self.runs[0].finished

    @property
    def seeds(self) -> str:
        """`0, 1, 2`; unknown ones as a number of runs."""
        seeds = [run.seed for run in self.runs]
        if any(seed is None for seed in seeds):
            return f"{len(seeds)} run{'s' if len(seeds) > 1 else ''}"
        return ", ".join(map(str, sorted(seed for seed in seeds if seed is not None)))

    @property
    def state(self) -> str:
        """Empty if every run has finished, else how far they are."""
        if not self.finished:
            return ", ".join(dict.fromkeys(run.state() for run in self.runs))
        left = len(self.unfinished)
        return f"{left} more unfinished" if left else ""

    def stat(self, key: str) -> Stat | None:
        """Over the runs; None where one of them lacks the value (a loss that was not a number)."""
        values = [run.value(key) for run in self.runs]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        std = statistics.stdev(known) if len(known) > 1 else None
        return Stat(statistics.fmean(known), std, len(known))

    def mean(self, key: str) -> float | None:
        stat = self.stat(key)
        return stat.mean if stat else None

    def densities(self) -> dict[str, float]:
        """Layer → density, mean over the runs that have the layer."""
        layers = dict.fromkeys(layer for run in self.runs for layer in run.densities)
        return {
            layer: statistics.fmean(
                run.densities[layer] for run in self.runs if layer in run.densities
            )
            for layer in layers
        }


@dataclass(frozen=True)
class Comparison:
    """Configurations in the order they are shown in, finished ones first."""

    configurations: list[Configuration]

    @cached_property
    def costs(self) -> tuple[str, ...]:
        """What accuracies are drawn over: milliseconds only where they were measured."""
        measured = any(run.milliseconds is not None for run in self.runs)
        return ("density", "macs", "milliseconds") if measured else ("density", "macs")

    @property
    def runs(self) -> list[Entry]:
        return [run for c in self.configurations for run in (*c.runs, *c.unfinished)]

    def front(self, cost: str) -> list[int]:
        """Indices of the finished configurations on the front of top-1 over mean `cost`."""
        costs = [c.mean(cost) if c.finished else None for c in self.configurations]
        accuracies = [c.mean("top1") for c in self.configurations]
        known = [
            (index, (x, y))
            for index, (x, y) in enumerate(zip(costs, accuracies, strict=True))
            if x is not None and y is not None
        ]
        return [known[place][0] for place in pareto_front([point for _, point in known])]

    @cached_property
    def differences(self) -> dict[str, list[Any]]:
        """Recipe key → its value in each configuration, of the keys in which they differ.

        MISSING where a configuration has no such key. Keys of a method differ between runs of that
        method alone: what one method calls density is not another's λ.
        """
        rows: dict[str, list[Any]] = {}
        for key in dict.fromkeys(key for c in self.configurations for key in c.settings):
            of_method = key.startswith("method.") and key != "method.name"
            values: dict[str, list[Any]] = {}
            for c in self.configurations:
                group = values.setdefault(c.method if of_method else "", [])
                group.append(c.settings.get(key, MISSING))
            if any(value != group[0] for group in values.values() for value in group):
                rows[key] = [c.settings.get(key, MISSING) for c in self.configurations]
        return rows

    @cached_property
    def warnings(self) -> list[str]:
        """What makes the numbers less comparable than they look."""
        sentences = [*self._data_warning(), *self._network_warning()]
        sentences += [f"{r.name} has no latency: {r.unmeasured}" for r in self.runs if r.unmeasured]
        for c in self.configurations:
            twice = [
                s for s, n in Counter(r.seed for r in c.runs).items() if n > 1 and s is not None
            ]
            if twice:
                sentences.append(
                    f"{c.name} holds seed {twice[0]} more than once: its deviation over seeds is "
                    "too small"
                )
            if c.finished and c.stat("top1") is None:
                sentences.append(
                    f"{c.name} finished without an accuracy: its loss was not a number"
                )
        unfinished = sum(not run.finished for run in self.runs)
        if unfinished:
            sentences.append(
                f"{unfinished} of {len(self.runs)} runs have not finished: they are in no mean of "
                "finished runs and not on the front"
            )
        return sentences

    def _data_warning(self) -> list[str]:
        data = {run.data: run for run in reversed(self.runs) if run.data is not None}
        if len(data) < 2:
            return []
        one, other = list(data.values())[:2]
        return [
            f"the runs were trained on {len(data)} different data sets, such as "
            f"{one.settings.get('data.path')} ({one.name}) and {other.settings.get('data.path')} "
            f"({other.name}): their accuracies cannot be compared"
        ]

    def _network_warning(self) -> list[str]:
        sizes = {c.mean("connections") for c in self.configurations} - {None}
        if len(sizes) < 2:
            return []
        return [
            "the networks differ in size: density is a share of each one's own connections; MACs "
            "compare them"
        ]


def compare_runs(
    runs: Iterable[str | Path], sort: str = "density", milliseconds: bool = False
) -> Comparison:
    """Read the runs and put them together by recipe.

    `runs`: run folders, folders of them, or `entity/project[/run_id]` of W&B. `sort`: a key of
    SORTS. `milliseconds`: measure each network in the native runtime, here and now. Raises
    ReportError in one sentence, also if no run has finished.
    """
    entries = with_data(with_defaults(read_entries(runs)))
    if not entries:
        raise ReportError("No run was given.")
    if not any(entry.finished for entry in entries):
        raise ReportError(
            f"None of the {len(entries)} runs has finished: scl report shows one that is under way."
        )
    if milliseconds:
        # Not unasked: it imports torch, and takes seconds for each run.
        from launcher.compare.milliseconds import with_milliseconds

        entries = with_milliseconds(entries)
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(_key(entry), []).append(entry)
    return Comparison(_sorted(_named([_configuration(group) for group in groups.values()]), sort))


def with_data(entries: Sequence[Entry]) -> list[Entry]:
    """`entries` with `data` filled in, which a run notes only when it has finished.

    A run under way is taken to read the data that finished runs have read at the same path, if
    those agree.
    """
    known: dict[str, set[str]] = {}
    for entry in entries:
        path, fingerprint = _data_of(entry)
        known.setdefault(path, set()).update([fingerprint] if fingerprint else [])

    def known_data(path: str, fingerprint: str | None) -> str | None:
        return fingerprint or (min(known[path] or {path}) if len(known[path]) < 2 else None)

    return [replace(entry, data=known_data(*_data_of(entry))) for entry in entries]


def _data_of(entry: Entry) -> tuple[str, str | None]:
    """The path of the data and, if the run has noted it, their fingerprint."""
    return str(entry.settings.get("data.path")), entry.run.summary.get("data")


def with_defaults(entries: Sequence[Entry]) -> list[Entry]:
    """`entries`, with the defaults of keys that the version which wrote them did not have."""
    shapes = {(e.method, frozenset(e.settings)) for e in entries if e.recipe}
    if len(shapes) == len({method for method, _ in shapes}):
        return list(entries)
    from launcher.compare.defaults import filled

    return [filled(entry) for entry in entries]


def _key(entry: Entry) -> str:
    """Equal for runs that differ in seed at most. The same data in another folder is the same."""
    if not entry.recipe:
        return entry.place
    settings = _compared(entry.settings) | {"data.path": entry.data}
    return repr(sorted((key, _plain(value)) for key, value in settings.items()))


def _plain(value: Any) -> Any:
    """JSON, through which W&B's recipes went, writes 1.0 as 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _compared(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key.split(".")[0] not in _IDENTITY}


def _configuration(group: list[Entry]) -> Configuration:
    finished = [entry for entry in group if entry.finished]
    unfinished = [entry for entry in group if not entry.finished]
    return Configuration(
        name=_common_name(group),
        method=group[0].method,
        settings=_compared(group[0].settings),
        runs=finished or unfinished,
        unfinished=unfinished if finished else [],
    )


def _common_name(group: list[Entry]) -> str:
    """What the names have in common, without the seed: lam0.1-seed0, lam0.1-seed1 → lam0.1."""
    names = [re.sub(rf"[-_.](seed|s)[-_]?{run.seed}$", "", run.name) for run in group]
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in same)
    return names[0] if len(set(names)) == 1 else common.rstrip("-_.") or names[0]


def _named(configurations: list[Configuration]) -> list[Configuration]:
    """Configurations of one name get their values of what differs; if that fails, a number."""
    result: list[Configuration] = []
    for name in dict.fromkeys(c.name for c in configurations):
        same = [c for c in configurations if c.name == name]
        if len(same) == 1:
            result += same
            continue
        rows = list(Comparison(same).differences.items())[:3]
        names = [
            " ".join([name, *(f"{key.split('.')[-1]}={row[index]}" for key, row in rows)])
            for index in range(len(same))
        ]
        if len(set(names)) < len(names):
            names = [f"{new} #{index + 1}" for index, new in enumerate(names)]
        result += [replace(c, name=new) for c, new in zip(same, names, strict=True)]
    return result


def _sorted(configurations: list[Configuration], sort: str) -> list[Configuration]:
    """By `sort`; equal ones by accuracy, then by method and name; unfinished ones at the end."""
    key, sign = SORTS[sort]
    methods = [*known_methods()]

    def order(c: Configuration) -> tuple[Any, ...]:
        value, top1 = c.mean(key), c.mean("top1")
        method = methods.index(c.method) if c.method in methods else len(methods)
        return (
            not c.finished,
            value is None,
            sign * value if value is not None else 0.0,
            -top1 if top1 is not None else 0.0,
            method,
            c.name,
        )

    return sorted(configurations, key=order)
