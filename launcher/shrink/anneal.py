"""Cut by cut, each fine-tuned and judged, until enough went or too much was lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.files import atomic_write
from launcher.cluster.process import end_with_parent, fork
from launcher.errors import RunError, UsageError
from launcher.export.source import Source, open_source
from launcher.shrink.asked import BEGUN, REPORT, Asked
from launcher.shrink.cutting import begin, make_cut, nothing_to_take, top1
from launcher.shrink.samples import training_samples
from launcher.shrink.write import MODEL, fine_tuning, note, write_network
from launcher.start.train import train
from launcher.terminal import say
from sclcore.export.cut import Cut

VERDICT = "verdict.json"


def anneal(asked: Asked, source: Source) -> int:
    """Make and judge the cuts of `asked`, or go on with them; returns the exit code.

    Cut N lies in `cuts/N`: the smaller network, the run that fine-tunes it, the verdict. Raises
    UsageError before anything is written, RunError where not one cut is good enough.
    """
    begun = asked.out / BEGUN
    _check_same(asked, begun)
    # What a recipe refuses is refused before anything is written.
    fine_tuning(source, asked.out / "cuts" / "01", Cut(), asked)
    if begun.is_file():
        start = json.loads(begun.read_text(encoding="utf-8"))["start"]
    else:
        start = begin(asked, source, say)
        if start["top1"] is None:
            raise UsageError(
                f"{asked.source} has no validation split here to tell what a cut loses: name the "
                "shards with --data"
            )
        asked.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"asked": asked.as_dict(), "start": start}, indent=1) + "\n"
        atomic_write(begun, text)
    least = start["top1"] - asked.tolerance / 100
    say(f"top-1 before: {start['top1']:.2%}; each cut may lose it down to {least:.2%}")
    good, verdicts = None, []
    for number in range(1, asked.cuts + 1):
        folder = asked.out / "cuts" / f"{number:02d}"
        code = _finish_cut(asked, source, folder, good, number, start)
        if code:
            if number == 1 and not folder.exists():
                shutil.rmtree(asked.out, ignore_errors=True)
            return code
        verdict = json.loads((folder / VERDICT).read_text(encoding="utf-8"))
        verdicts.append(verdict)
        if not verdict["kept"]:
            break
        good = folder if verdict["made"] else good
    if good is None:
        raise RunError(_nothing_kept(asked, start, verdicts[0]))
    return _apart(lambda: _conclude(asked, source, good, start, verdicts))


def _nothing_kept(asked: Asked, start: dict[str, Any], first: dict[str, Any]) -> str:
    if not first["made"]:
        return f"{asked.source} stays as it is: {nothing_to_take(asked)}"
    return (
        f"the first cut loses more than {asked.tolerance:g} points (top-1 {start['top1']:.2%} → "
        f"{first['top1']:.2%}): {asked.source} stays as it is; take less at a time, by a smaller "
        "--share or more --cuts, or train for more --epochs"
    )


def _check_same(asked: Asked, begun: Path) -> None:
    if not begun.is_file():
        return
    before = json.loads(begun.read_text(encoding="utf-8"))["asked"]
    for key, value in asked.as_dict().items():
        if before.get(key) != value:
            raise UsageError(
                f"--out {asked.out} was begun with {key} {before.get(key)!r}, not {value!r}: give "
                "the same command to go on, or choose another folder"
            )


def _finish_cut(
    asked: Asked,
    source: Source,
    folder: Path,
    good: Path | None,
    number: int,
    start: dict[str, Any],
) -> int:
    """Make, fine-tune and judge one cut, as far as that is not done. Returns an exit code."""
    if (folder / VERDICT).is_file():
        return 0
    if not folder.is_dir():
        say(f"cut {number} of {asked.cuts}")

        def cut() -> int:
            now = source if good is None else _trained(good)
            if not make_cut(asked, source, now, folder, number, start, say):
                folder.mkdir(parents=True)
                # Faster already than this part of the way to a budget; another way has an end.
                verdict = {"cut": number, "made": False, "kept": asked.by == "latency"}
                atomic_write(folder / VERDICT, json.dumps(verdict) + "\n")
            return 0

        if code := _apart(cut):
            return code
        if (folder / VERDICT).is_file():
            return 0
    recipe = fine_tuning(source, folder, Cut(), asked) if asked.epochs else None
    if recipe is not None and (code := train(recipe)):
        return code
    return _apart(lambda: _judge(asked, folder, number, start))


def _judge(asked: Asked, folder: Path, number: int, start: dict[str, Any]) -> int:
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    after = top1(_trained(folder), asked.data)
    assert after is not None
    kept = after >= start["top1"] - asked.tolerance / 100
    verdict = {
        "cut": number,
        "made": True,
        "kept": kept,
        "top1": after,
        "top1_before_training": report["after"]["top1"],
        "parameters": report["after"]["parameters"],
        "macs": report["after"]["macs"],
        **{key: report[key] for key in ("promised_ms", "measured_ms", "error") if key in report},
    }
    say(
        f"cut {number}: {verdict['parameters']:,} parameters, top-1 {after:.2%}"
        f"{'' if kept else ': too much is lost, the last good network stays'}"
    )
    atomic_write(folder / VERDICT, json.dumps(verdict, indent=1) + "\n")
    return 0


def _trained(folder: Path) -> Source:
    """The network of a cut, fine-tuned where it was."""
    run = folder / "run"
    return open_source(run if (run / MODEL).is_file() else folder)


def _conclude(
    asked: Asked, source: Source, good: Path, start: dict[str, Any], verdicts: list[dict[str, Any]]
) -> int:
    """The files of the last good network beside `cuts/`; the report comes last."""
    trained = _trained(good)
    assert trained.network.cut is not None
    report = json.loads((good / REPORT).read_text(encoding="utf-8"))
    last = next(v for v in reversed(verdicts) if v["kept"] and v["made"])
    report["after"] |= {"top1": last["top1"]}
    report |= {"cut": last["cut"], "cuts": verdicts}
    final = asked.out / "final"
    if final.is_dir():
        shutil.rmtree(final)
    recipe = fine_tuning(source, asked.out, trained.network.cut, asked)
    samples = training_samples(source, asked.data, min(64, asked.samples))
    write_network(final, trained.model, trained.network, recipe, report, samples[0][0])
    for file in sorted(final.iterdir(), key=lambda path: path.name == REPORT):
        file.replace(asked.out / file.name)
    final.rmdir()
    note(asked.out, report)
    return 0


def _apart(body: Callable[[], int]) -> int:
    """Run `body` in a process of its own, whose threads end with it: ranks are forked from here."""
    parent = os.getpid()

    def apart() -> int:
        end_with_parent(parent)
        # PyTorch makes its pool of threads anew at the first use after a fork, and two threads that
        # use it at once (autograd has one of its own) may find none: before there is a second.
        torch.set_num_threads(1)
        return body()

    _, status = os.waitpid(fork(apart), 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    say(
        f"error: the process that made this cut was ended by {signal.Signals(-code).name}; the "
        "same command goes on after the last cut that is finished"
    )
    return 128 - code
