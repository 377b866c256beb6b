"""Every kind of fault the campaign knows, by name."""

from __future__ import annotations

from tests.faults.faults import RunningFault, StoppedFault
from tests.faults.processes import Freeze, KillAll, KillLauncher, KillRank, Terminate, User1
from tests.faults.shards import ShardMissing, ShardVanishes
from tests.faults.storage import FlipBits, FullDisk, Truncate

RUNNING: dict[str, type[RunningFault]] = {
    fault.kind: fault
    for fault in (
        KillRank,
        KillAll,
        KillLauncher,
        Terminate,
        User1,
        FullDisk,
        ShardVanishes,
        Freeze,
    )
}
STOPPED: dict[str, type[StoppedFault]] = {
    fault.kind: fault for fault in (Truncate, FlipBits, ShardMissing)
}
NAN = "NaN in a gradient"
"""Built into the course of a run: see course.py."""

KINDS = (*RUNNING, *STOPPED, NAN)
WHAT = (
    {kind: fault.what for kind, fault in RUNNING.items()}
    | {kind: fault.what for kind, fault in STOPPED.items()}
    | {NAN: "one rank's gradient of one parameter is NaN for one update"}
)
