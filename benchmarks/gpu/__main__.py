"""Everything that one GPU can tell of SCL, in so many minutes, the most worthwhile first.

    python -m benchmarks.gpu --minutes 8 --out DIR [--device cuda|cpu] [--only NAME ...]

Each part is a process of its own with its share of the time: one that fails, hangs or runs out of
time ends alone, and what it had measured stays. `results.json` in DIR is written anew after every
part, `NAME.log` has what it printed; a table and one line of JSON come at the end. Nothing is
downloaded. A part that needs a package that is not there says so. On the CPU the same parts run
at toy sizes, to see that they do: their numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, table
from benchmarks.gpu.parts import PARTS, Measuring, Part
from benchmarks.gpu.process import forked, import_first
from data.files import atomic_write

# What a part may need beyond its time to come to its end and to be ended.
_GRACE_S = 5


def main() -> int:
    options = _parsed()
    out: Path = options.out
    began = time.monotonic()
    end = began + 60 * options.minutes
    out.mkdir(parents=True, exist_ok=True)
    os.environ["DS_ACCELERATOR"] = options.device
    chosen = [part for part in PARTS if not options.only or part.name in options.only]
    import_first(part.module for part in chosen if not part.missing)
    device = torch.device(options.device)
    name = out / "machine.txt"
    forked(lambda: name.write_text(machine(device)), out / "machine.log", 60)
    found = {
        "machine": name.read_text() if name.exists() else "unknown, see machine.log",
        "device": options.device,
        "minutes": options.minutes,
        "parts": [],
    }
    for number, part in enumerate(chosen):
        left = end - time.monotonic() - _GRACE_S
        weights = sum(other.weight for other in chosen[number:])
        seconds = min(left, max(part.least_s, left * part.weight / weights))
        found["parts"].append(_measured(part, seconds, device, out))
        _write(out, found)
        print(_lines(found["parts"][-1]), flush=True)
    found["seconds"] = round(time.monotonic() - began, 1)
    _write(out, found)
    print(f"\n{found['machine']}, {found['seconds']:.0f} s; in {out}: results.json, table.txt")
    print((out / "table.txt").read_text())
    print(json.dumps(found))
    return 1 if any(part["state"] == "failed" for part in found["parts"]) else 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8, help="time in all (default: 8)")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is measured")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes:g}; it must be above 0")
    # Asked so, the driver is not begun with here, of which forked processes could not use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use; --device cpu is the rehearsal")
    return options


def _measured(part: Part, seconds: float, device: torch.device, out: Path) -> dict[str, Any]:
    """Run a part for `seconds` at most; what it found, and how it ended."""
    result: dict[str, Any] = {"name": part.name, "about": part.about, "rows": [], "seconds": 0.0}
    if part.missing:
        return result | {"state": f"needs {', '.join(part.missing)}"}
    if seconds < part.least_s:
        return result | {"state": "no time left"}
    rows, log = out / f"{part.name}.jsonl", out / f"{part.name}.log"
    rows.unlink(missing_ok=True)
    began = time.monotonic()

    def run() -> None:
        module = importlib.import_module(f"benchmarks.gpu.{part.module}")
        module.run(Measuring(part.name, device, seconds, rows))

    code = forked(run, log, seconds)
    result["seconds"] = round(time.monotonic() - began, 1)
    if rows.exists():
        # The last line may be cut where the part was killed.
        result["rows"] = [json.loads(line) for line in rows.read_text().split("\n")[:-1]]
        rows.unlink()
    result["state"] = {0: "done", None: "out of time"}.get(code, "failed")
    if code:
        result["error"] = (log.read_text().strip().splitlines() or [f"exit code {code}"])[-1]
    return result


def _write(out: Path, found: dict[str, Any]) -> None:
    atomic_write(out / "results.json", json.dumps(found, indent=1) + "\n")
    atomic_write(out / "table.txt", "\n".join(map(_lines, found["parts"])) + "\n")


def _lines(part: dict[str, Any]) -> str:
    head = f"## {part['name']}: {part['about']} [{part['state']}, {part['seconds']:.0f} s]"
    if part.get("error"):
        head += f"\n{part['error']}"
    if not part["rows"]:
        return head
    rows = [
        [
            row["what"],
            f"{row['value']:.4g}" if isinstance(row["value"], float) else str(row["value"]),
            row["unit"],
            row.get("target", ""),
        ]
        for row in part["rows"]
    ]
    return f"{head}\n{table(['', 'value', 'unit', 'target'], rows)}"


if __name__ == "__main__":
    sys.exit(main())
