"""Running the runs of a sweep: each a `scl train` of its own, several at a time."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil
import torch
from tqdm import tqdm

from launcher.cluster.accelerator import accelerator
from launcher.cluster.process import end_with_parent, fork, stops
from launcher.cluster.world import find_world
from launcher.errors import UsageError
from launcher.folder.results import is_number, last_line, latest, read_run, rows_of
from launcher.run.prepare import prepare
from launcher.start.sweep import SweepRun
from launcher.start.train import train
from launcher.terminal import Pace, Waiting, say

_POLL_S = 0.2
_TAIL_LINES = 15


@dataclass(frozen=True)
class Standing:
    """A run of a sweep, and how far it is already."""

    run: SweepRun
    step: int
    finished: bool
    awaited: str | None = None
    """The checkpoint of its mirror that it will fetch and continue from."""

    @property
    def phrase(self) -> str:
        if self.awaited is not None:
            return f"continues from {self.awaited} of its mirror"
        if self.finished:
            return "finished"
        return f"continues at step {self.step:,}" if self.step else "new"


def check_runs(runs: list[SweepRun]) -> list[Standing]:
    """Everything `scl train` would refuse is refused here, for all runs, before any starts.

    Raises UsageError, DataError or CheckpointError naming the run.
    """
    if find_world().source != "single process":
        raise UsageError(
            "scl sweep starts its runs itself and is no rank of one: under Slurm, submit "
            "slurm/sweep.sh, whose tasks train one run each (--task), or run it without srun"
        )
    standings = []
    for number, run in enumerate(runs, start=1):
        recipe = run.recipe
        with Waiting(f"checking run {number} of {len(runs)}, {run.name}"):
            # What a mirror has is fetched by the run itself.
            prepared = prepare(recipe, recipe.engine.ranks, fetch=False)
        step = prepared.start.step if prepared.start else 0
        standings.append(Standing(run, step, prepared.is_finished, prepared.awaited))
    return standings


def default_jobs(runs: list[SweepRun]) -> int:
    """How many runs at a time fill this machine: by its GPUs if it has any, else by its cores."""
    if accelerator() == "cuda":
        return max(1, torch.cuda.device_count() // max(r.recipe.engine.ranks for r in runs))
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // max(r.recipe.engine.ranks * r.recipe.engine.threads for r in runs))


def run_all(standings: list[Standing], jobs: int) -> int:
    """Train what is not finished, `jobs` at a time. Exit codes: 0, 1 some failed, 128 + signal."""
    jobs_now = _Jobs([s.run for s in standings if not s.finished], jobs)
    done = sum(standing.finished for standing in standings)
    bar = tqdm(
        total=sum(standing.run.recipe.optim.epochs for standing in standings),
        initial=sum(_epochs_done(s.run) for s in standings),
        unit="epoch",
        disable=not sys.stderr.isatty(),
    )
    pace = Pace()
    with bar, _passing_signals(jobs_now):
        while jobs_now.advance():
            for run, code in jobs_now.pop_ended():
                done += 1
                tqdm.write(_verdict(run, code, f"{done}/{len(standings)}"), file=sys.stderr)
            bar.set_description(f"{done}/{len(standings)} runs", refresh=False)
            bar.n = sum(_epochs_done(s.run) for s in standings)
            bar.refresh()
            if bar.disable and pace.is_due():
                say(f"{done}/{len(standings)} runs done; {_under_way(jobs_now)}")
            time.sleep(_POLL_S)
    if jobs_now.signal:
        say("stopped; the same command continues from there")
        return 128 + jobs_now.signal
    if jobs_now.failed:
        say(
            f"error: {len(jobs_now.failed)} of {len(standings)} runs failed: "
            f"{', '.join(jobs_now.failed)}"
        )
        return 1
    return 0


@dataclass
class _Job:
    run: SweepRun
    pid: int
    slot: int
    told: bool = False
    code: int | None = None

    def has_ended(self) -> bool:
        """Whether the run has ended; if so, `code` says how: negative if a signal did it."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None


@dataclass
class _Jobs:
    """What waits, what runs, what ended."""

    waiting: list[SweepRun]
    jobs: int
    running: list[_Job] = field(default_factory=list)
    ended: list[tuple[SweepRun, int]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    signal: int = 0

    def __post_init__(self) -> None:
        self._ranks = max((run.recipe.engine.ranks for run in self.waiting), default=1)
        self._interrupts = 0

    def advance(self) -> bool:
        """Take in what ended and start what there is room for; whether anything is left to do."""
        for job in [job for job in self.running if job.has_ended()]:
            self.running.remove(job)
            self.ended.append((job.run, job.code or 0))
            if job.code and not self.signal:
                self.failed.append(job.run.name)
        if self.signal:
            self.waiting.clear()
            self._pass_on()
        while self.waiting and len(self.running) < self.jobs:
            slot = min(set(range(self.jobs)) - {job.slot for job in self.running})
            self.running.append(_start(self.waiting.pop(0), slot, self._ranks))
        return bool(self.running or self.ended)

    def pop_ended(self) -> list[tuple[SweepRun, int]]:
        ended, self.ended = self.ended, []
        return ended

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; `advance` passes it on, and the runs save and stop."""
        self.signal = self.signal or number
        self._interrupts += number == signal.SIGINT

    def _pass_on(self) -> None:
        """Send the signal once to each run; a second Ctrl-C kills them."""
        for job in self.running:
            if self._interrupts > 1:
                _kill(job.pid)
            elif not job.told:
                os.kill(job.pid, self.signal)
                job.told = True


def _start(run: SweepRun, slot: int, ranks: int) -> _Job:
    """Fork a process that trains `run` as `scl train` does, with its output in a file."""
    gpus = _gpus_of(slot, ranks) if accelerator() == "cuda" else None
    sweep = os.getpid()

    def body() -> int:
        # A session of its own: Ctrl-C reaches the run through the sweep alone, and only once.
        os.setsid()
        end_with_parent(sweep)
        _write_to(run.recipe.folder / "train.log")
        if gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return train(run.recipe)

    run.recipe.folder.mkdir(parents=True, exist_ok=True)
    return _Job(run, fork(body), slot)


def _write_to(path: Path) -> None:
    """Let this process, and what it starts, write to the end of `path`, and read nothing."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number, target in enumerate((nothing, log, log)):
        os.dup2(target, number)


def _gpus_of(slot: int, ranks: int) -> list[str]:
    """The GPUs of a job: those of its own while there are enough, else shared in turn."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    return [devices[(slot * ranks + i) % len(devices)] for i in range(min(ranks, len(devices)))]


def _kill(pid: int) -> None:
    try:
        process = psutil.Process(pid)
        below = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for member in (*below, process):
        member.kill()


def _under_way(jobs: _Jobs) -> str:
    """The runs that are being trained, and how far each is."""
    parts = [
        f"{job.run.name}, epoch {_epochs_done(job.run)} of {job.run.recipe.optim.epochs}"
        for job in jobs.running
    ]
    return f"under way: {'; '.join(parts)}" if parts else "none under way"


@contextmanager
def _passing_signals(jobs: _Jobs) -> Iterator[None]:
    former = {number: signal.signal(number, jobs.stop) for number in stops()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _verdict(run: SweepRun, code: int, count: str) -> str:
    """One line about a run that ended well; the end of its log about another."""
    if code == 0:
        rows = rows_of(latest(read_run(run.recipe.folder)))
        known = [
            f"{key} {rows[key]}" for key in ("top-1", "density", "training time") if key in rows
        ]
        return f"{count} {run.name}: {', '.join(known)}"
    log = run.recipe.folder / "train.log"
    tail = "\n".join(f"    {line}" for line in _tail(log))
    ended = f"was stopped by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"{count} {run.name} {ended}; the end of {log}:\n{tail}"


def _tail(path: Path) -> list[str]:
    # What a progress bar overwrote is not worth showing.
    lines = path.read_text(errors="replace").splitlines()
    return lines[-_TAIL_LINES:]


def _epochs_done(run: SweepRun) -> int:
    """Whole epochs in the last line of its metrics."""
    line = last_line(run.recipe.folder / "metrics.jsonl") or {}
    epoch = line.get("epoch")
    return int(epoch) if is_number(epoch) else 0
