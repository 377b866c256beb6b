"""Which checkpoints stay: the newest, the best, and some of those that nothing surpasses.

`best` and `pareto.json` follow from the manifests that are there, so that a kill between any two
writes loses nothing: the next save writes them again.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from data.files import atomic_write, remove_tree
from launcher.checkpoints.manifest import Evaluation, Manifest, problems

_log = logging.getLogger("scl.checkpoint")

Manifests = Mapping[str, Manifest]
"""By folder name, oldest save first."""


class Evaluated(Evaluation):
    """A line of pareto.json: an evaluated checkpoint, whose folder may have been retired since."""

    checkpoint: str
    step: int
    density: float


_LIST = TypeAdapter(list[Evaluated])


def best_of(known: Manifests) -> str | None:
    """The folder with the best top-1 among models at their final density; the older of equals.

    Of two saves of the same step, the newer.
    """
    best: str | None = None
    for name, manifest in known.items():
        if manifest.evaluation is None or not manifest.evaluation.final:
            continue
        if best is None or _is_better(manifest, known[best]):
            best = name
    return best


def _is_better(manifest: Manifest, than: Manifest) -> bool:
    assert manifest.evaluation is not None and than.evaluation is not None
    ours, theirs = manifest.evaluation.top1, than.evaluation.top1
    return ours > theirs or (manifest.step == than.step and ours >= theirs)


def pareto_front(evaluated: Sequence[Evaluated]) -> list[Evaluated]:
    """Those that none surpasses in top-1 without more connections; fewest connections first."""
    front: list[Evaluated] = []
    # By connections; of equals the better first, and of those the later.
    for entry in sorted(evaluated, key=lambda e: (e.live, -e.top1, -e.step)):
        if not front or entry.top1 > front[-1].top1:
            front.append(entry)
    return front


def thin_out(front: Sequence[Evaluated], count: int) -> list[Evaluated]:
    """At most `count` of a front, spread evenly over the logarithm of connections."""
    left = list(front)
    while len(left) > max(0, count):
        inner = range(1, len(left) - 1)
        # With two left, the one with fewer connections goes: it is usually the newest, or the best.
        least = min(inner, key=lambda i: _gap(left[i - 1], left[i + 1]), default=0)
        del left[least]
    return left


def _gap(fewer: Evaluated, more: Evaluated) -> float:
    return math.log(max(1, more.live)) - math.log(max(1, fewer.live))


def read_pareto(root: Path) -> list[Evaluated]:
    """The list in `root`; empty, with a warning, if it cannot be read."""
    path = root / "pareto.json"
    try:
        return _LIST.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        _log.warning("%s cannot be read; it is written anew from the checkpoints there", path)
        return []


def updated_front(root: Path, known: Manifests) -> list[Evaluated]:
    """The list in `root`, with the checkpoints there are; a step saved again replaces its entry."""
    # With nothing but the first checkpoint of a run, a list is that of a run before it.
    by_step = {entry.step: entry for entry in read_pareto(root)} if len(known) > 1 else {}
    for name, manifest in known.items():
        if (evaluation := manifest.evaluation) is not None:
            density = evaluation.live / evaluation.connections if evaluation.connections else 1.0
            by_step[manifest.step] = Evaluated(
                checkpoint=name, step=manifest.step, density=density, **evaluation.model_dump()
            )
    return pareto_front([*by_step.values()])


def write_pareto(root: Path, front: Sequence[Evaluated]) -> None:
    """Replace `pareto.json`; a disk that refuses is a warning: the next save makes up for it."""
    lines = ",\n ".join(json.dumps(entry.model_dump()) for entry in front)
    try:
        atomic_write(root / "pareto.json", f"[{lines}]\n")
    except OSError as error:
        _log.warning("cannot write %s: %s", root / "pareto.json", error)


def superfluous(
    known: Manifests, front: Sequence[Evaluated], *, keep: int, keep_pareto: int
) -> list[str]:
    """What of the sound checkpoints `known` the rule does not keep, newest first.

    Kept are the newest `keep` steps, each once, the best, and `keep_pareto` of `front`.
    """
    present = [entry for entry in front if entry.checkpoint in known]
    spared = {best_of(known), *(e.checkpoint for e in thin_out(present, keep_pareto))}
    steps: set[int] = set()
    leaving = []
    for name in reversed([*known]):
        step = known[name].step
        if len(steps) < keep and step not in steps:
            steps.add(step)
        elif name not in spared:
            leaving.append(name)
    return leaving


def point(root: Path, known: Manifests, latest: str) -> list[Evaluated]:
    """Write `best`, `latest` and `pareto.json`; returns the front. Raises OSError."""
    if best := best_of(known):
        atomic_write(root / "best", best + "\n")
    atomic_write(root / "latest", latest + "\n")
    front = updated_front(root, known)
    write_pareto(root, front)
    return front


def retire(root: Path, known: Manifests, *, keep: int, keep_pareto: int) -> None:
    """Point to the last of `known`, the newest, and delete what does not stay.

    Damaged folders are neither counted nor deleted: someone may want to rescue something. Raises
    OSError.
    """
    whole = {n: m for n, m in known.items() if not problems(root / n, read_content=False)}
    front = point(root, whole, latest=[*known][-1])
    for name in superfluous(whole, front, keep=keep, keep_pareto=keep_pareto):
        try:
            remove_tree(root / name)
        except OSError as error:
            _log.warning("cannot remove the old checkpoint %s: %s", root / name, error)
