"""`python -m tests.faults`: inject faults into real trainings and check what comes of each.

    python -m tests.faults --faults 100 --seed 0 --out docs/reliability.md
    python -m tests.faults --faults 12 --only SIGTERM --only "full disk while saving"

Started again with the same --work, a campaign that was killed goes on. Exit code 1 if any
requirement failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from tests.faults import contain
from tests.faults.campaign import Campaign
from tests.faults.course import Limits
from tests.faults.record import Record
from tests.faults.registry import KINDS
from tests.faults.storage import mounts_below
from tests.faults.table import report, write_between_markers


def main(arguments: list[str]) -> int:
    """Run a campaign; 0 if every requirement was met, 1 if one was not."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="how many, over all kinds")
    parser.add_argument("--seed", type=int, default=0, help="decides kinds, moments and victims")
    parser.add_argument("--only", action="append", default=[], choices=KINDS, help="this kind")
    parser.add_argument("--out", type=Path, help="document with markers to write the table into")
    parser.add_argument("--work", type=Path, help="folder (default: runs/faults/N-faults-seed-S)")
    parser.add_argument("--timeout", type=int, default=30, help="engine.timeout_s of the runs")
    options = parser.parse_args(arguments)
    if not contain.is_contained():
        contain.enter(arguments)
        print("no namespaces here: what a kill of the campaign leaves, nobody clears away")
    name = f"{options.faults}-faults-seed-{options.seed}"
    work = (options.work or Path("runs/faults") / name).resolve()
    limits = Limits(collective=options.timeout, step=2 * options.timeout // 5)
    campaign = Campaign(work, options.faults, options.seed, options.only, limits)
    began = time.monotonic()
    with tqdm(total=sum(campaign.wanted.values()), unit="fault", file=sys.stderr) as bar:
        bar.update(len(campaign.journal.records))

        def tell(record: Record) -> None:
            bar.update()
            tqdm.write(record.line(), file=sys.stdout)
            sys.stdout.flush()

        campaign.run(tell)
    for point in mounts_below(work):
        print(f"left mounted: {point}")
    records = list(campaign.journal.records.values())
    command = f"python -m tests.faults --faults {options.faults} --seed {options.seed}"
    text = report(records, campaign.skipped, command, (time.monotonic() - began) / 60)
    print(text)
    if options.out is not None:
        write_between_markers(options.out, text)
    good = all(record.as_required and record.equal for record in records)
    return 0 if good and records and not mounts_below(work) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
