"""A short campaign, one fault of each kind, and proof that its judgement can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.faults import contain
from tests.faults.processes import KillRank
from tests.faults.published import Published, Saved, difference, lost, series
from tests.faults.ranks import ROOT, Ranks, wait_for
from tests.faults.record import Journal
from tests.faults.registry import KINDS
from tests.faults.storage import Truncate
from tests.faults.table import BEGIN, END, table, write_between_markers

# Minutes on two idle cores; several times that beside other tests.
_PATIENCE_S = 1500


@pytest.mark.timeout(_PATIENCE_S + 60)
@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param((KillRank.kind, Truncate.kind), id="a kill and damage"),
        pytest.param(KINDS, marks=pytest.mark.long, id="every kind"),
    ],
)
def test_one_fault_of_each_kind_ends_as_required(kinds: tuple[str, ...], tmp_path: Path) -> None:
    work = tmp_path / "campaign"
    command = [sys.executable, "-m", "tests.faults", "--faults", str(len(kinds)), "--seed", "3"]
    command += ["--work", str(work), "--timeout", "60"]
    for kind in kinds:
        command += ["--only", kind]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=_PATIENCE_S, check=False
    )
    said = result.stdout + result.stderr[-3000:]
    assert result.returncode == 0, said
    records = Journal(work / "record.jsonl").records.values()
    injected = {record.kind for record in records}
    missing = [kind for kind in kinds if kind not in injected and f"{kind} |" not in result.stdout]
    assert missing == [], said
    assert all(record.equal for record in records)
    assert str(work) not in Path("/proc/mounts").read_text()


@pytest.mark.skipif(contain.way_in() is None, reason="no namespaces may be made here")
def test_nothing_outlives_a_campaign_that_is_killed(tmp_path: Path) -> None:
    work = tmp_path / "campaign"
    command = [sys.executable, "-m", "tests.faults", "--faults", "1", "--work", str(work)]
    campaign = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        # unshare, process 1, the campaign, and what packs the data or the two ranks.
        assert wait_for(lambda: _processes_of(work) > 3, 120, 0.1)
    finally:
        campaign.kill()
        campaign.wait()
    assert wait_for(lambda: not _processes_of(work), 20, 0.1)


def _processes_of(work: Path) -> int:
    found = psutil.process_iter(["cmdline"])
    return sum(any(str(work) in part for part in p.info["cmdline"] or ()) for p in found)


def test_what_a_start_leaves_is_swept_even_when_it_ignores_signals(tmp_path: Path) -> None:
    program = tmp_path / "stubborn.py"
    program.write_text(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if len(sys.argv) < 2:\n"
        "    subprocess.Popen([sys.executable, __file__, 'child'], start_new_session=True)\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {"PYTHONPATH": str(tmp_path)}
    with Ranks([], tmp_path / "log.txt", "by hand", "stubborn", **environment) as ranks:
        assert wait_for(lambda: ranks.output().count("up") == 4, 60)
        assert ranks.wait_gone(0.2) is None
        assert len(ranks.alive()) == 4
    assert ranks.alive() == []


def _line(step: int, loss: float) -> bytes:
    return json.dumps({"step": step, "time": step + 0.5, "train/loss": loss}).encode()


def _published(steps: list[int], saved: dict[str, Saved], discarded: int = 0) -> Published:
    lines = [_line(step, 1 / step) for step in steps]
    aside = [_line(step, 1 / step) for step in range(1, discarded + 1)]
    return Published(lines, aside, saved, next(iter(saved), None), {})


def test_a_lost_line_and_a_lost_or_changed_checkpoint_are_seen() -> None:
    one = {"step-00000002": Saved(2, 10, {"model.pt": "a"})}
    before = _published([1, 2, 3], one)
    assert lost(before, _published([1, 2, 3], one, discarded=3), 2, []) == []
    assert lost(before, _published([1, 3], one, discarded=3), 2, []) != []
    assert lost(before, _published([1, 2], one), 2, []) != []
    assert lost(before, _published([1, 2, 3], {}), 2, []) != []
    changed = {"step-00000002": Saved(2, 10, {"model.pt": "b"})}
    assert lost(before, _published([1, 2, 3], changed), 2, []) != []
    newer = {"step-00000003": Saved(3, 11, {"model.pt": "b"})}
    assert lost(before, _published([1, 2, 3], newer), 2, []) == []


def test_series_differ_by_values_and_steps_and_not_by_times() -> None:
    ours = series([_line(1, 0.5), _line(2, 0.25)])
    later = [line.replace(b".5,", b".75,") for line in (_line(1, 0.5), _line(2, 0.25))]
    assert difference(ours, series(later)) is None
    assert difference(ours, series([_line(1, 0.5), _line(2, 0.2500001)])) is not None
    assert difference(ours, series([_line(1, 0.5), _line(3, 0.25)])) is not None
    assert difference(ours, series([_line(1, 0.5)])) is not None


def test_a_journal_cut_short_by_a_kill_is_read(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    journal = Journal(path)
    common = {"run": "run-00", "course": "plain", "launcher": "by hand", "phase": "training"}
    record = journal.new(kind="SIGTERM", step=3, **common)
    journal.write(record)
    record.equal = True
    journal.write(record)
    with path.open("a") as file:
        file.write('{"number": 2, "kind": "SIG')
    again = Journal(path)
    assert list(again.records) == [1] and again.records[1].equal
    assert again.new(kind="SIGTERM", step=4, **common).number == 2


def test_the_table_goes_between_the_markers(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "record.jsonl")
    common = {"run": "run-00", "course": "plain", "launcher": "by hand", "phase": "training"}
    good = journal.new(kind="SIGTERM", step=3, ended_s=1.25, recovered_s=9.0, equal=True, **common)
    journal.write(good)
    bad = journal.new(kind="SIGTERM", step=9, equal=False, problems=["it hung"], **common)
    journal.write(bad)
    text = table(journal.records.values(), {})
    assert "| 2 | 1 | 1.2 | 9.0 | 1 of 2 |" in text
    document = tmp_path / "document.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between_markers(document, text)
    written = document.read_text()
    assert "old" not in written and "before" in written and "after" in written and text in written
    with pytest.raises(ValueError, match="no lines"):
        write_between_markers(tmp_path / "record.jsonl", text)
