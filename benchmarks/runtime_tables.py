"""The tables of the native runtime, from its benchmarks, into docs/runtime.md and RESULTS.md.

    python -m benchmarks.runtime_tables [--quick] [--keep FOLDER] [--again]

Runs `benchmarks.runtime --train` and `benchmarks.runtime_layers`, keeps the last line of each in
`--keep` (runs/runtime), and writes the tables between their marks in the documents. `--again`
writes them from what is kept, and measures nothing. `--quick` only prints.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "docs/runtime.md", ROOT / "benchmarks/RESULTS.md")
BEGIN, END = "<!-- python -m benchmarks.runtime_tables: {} -->\n", "<!-- end -->"
COMMANDS = {"runtime": ["--train"], "runtime_layers": []}
_PACKAGES = ("torch", "onnxruntime", "openvino")
_NAMES = {"resnet50": "ResNet-50", "mobilenetv2_100": "MobileNetV2"}
Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    parser.add_argument("--keep", type=Path, default=Path("runs/runtime"), help="of the reports")
    parser.add_argument("--again", action="store_true", help="from what is kept")
    options = parser.parse_args()
    reports = {name: _report(name, more, options) for name, more in COMMANDS.items()}
    tables = {
        block: f"{_about(reports[name])}\n\n{_markdown(rows(reports[name]))}"
        for block, (name, rows) in BLOCKS.items()
    }
    if options.quick:
        print("\n\n".join(tables.values()))
        return
    for document in DOCUMENTS:
        atomic_write(document, with_tables(document.read_text(encoding="utf-8"), tables))


def _report(name: str, more: list[str], options: argparse.Namespace) -> Report:
    kept = options.keep / f"{name}.json"
    if options.again:
        return json.loads(kept.read_text(encoding="utf-8"))
    about = {"date": str(datetime.date.today()), "load": os.getloadavg()[0], "cpu": _cpu()}
    about["versions"] = {p: v for p in _PACKAGES if (v := _version(p))}
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    command += (
        ["--quick", *(["--runs", ""] if name == "runtime" else [])] if options.quick else more
    )
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line
            if not line.startswith("{"):
                print(line, end="", flush=True)
    if process.returncode:
        sys.exit(f"{name} failed: nothing is written")
    report = json.loads(last) | about
    options.keep.mkdir(parents=True, exist_ok=True)
    atomic_write(kept, json.dumps(report))
    return report


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def _about(report: Report) -> str:
    versions = ", ".join(f"{package} {v}" for package, v in report["versions"].items())
    return (
        f"`python -m benchmarks.{report['benchmark']}`, {report['date']}, {report['cpu']}, "
        f"{os.cpu_count()} cores at a load of {report['load']:.1f} when it began; {versions}."
    )


def densities(report: Report) -> list[list[str]]:
    """Best dense ÷ native of the random networks, and milliseconds of both."""
    rows = [r for r in report["details"]["rows"] if r["batch"] == 1 and "compact" in r]
    columns = list(dict.fromkeys((r["network"], r["spread"]) for r in rows))
    names = [f"{_name(n)}{', ERK' * (spread == 'erk')}" for n, spread in columns]
    lines = [["connections left", *names, "wanted of ResNet-50"]]
    for density in dict.fromkeys(r["density"] for r in rows):
        found = {(r["network"], r["spread"]): r for r in rows if r["density"] == density}
        cells = [_ratio(found[key]) if key in found else "" for key in columns]
        target = found[columns[0]]["target"]
        lines.append([f"{100 * density:g} %", *cells, f"{target:g} ×" if target else ""])
    dense = [_dense(next(r for r in rows if r["network"] == n)) for n, _ in columns]
    return [*lines, ["dense, ms", *dense, ""]]


def _ratio(row: Report) -> str:
    return f"{row['ratio']:.2f} × ({row['milliseconds']['native']:.3g} ms)"


def _dense(row: Report) -> str:
    times = {e: t for e, t in row["milliseconds"].items() if e != "native"}
    return ", ".join(f"{engine} {time:.3g}" for engine, time in times.items())


def batches(report: Report) -> list[list[str]]:
    """Milliseconds of each engine by batch and threads, MB at the peak, and bytes of the file."""
    rows = [r for r in report["details"]["rows"] if "memory" in r]
    keys = list(dict.fromkeys((r["batch"], r["threads"]) for r in rows))
    keys.sort(key=lambda key: (key[1], key[0]))
    times = [f"{batch}, {threads} thread{'s' * (threads > 1)}" for batch, threads in keys]
    sizes = sorted({batch for batch, _ in keys})
    memory = [f"MB at batch {batch}" for batch in sizes]
    lines = [["network", "engine", *(f"ms at batch {t}" for t in times), *memory]]
    for network in dict.fromkeys(r["network"] for r in rows):
        found = {(r["batch"], r["threads"]): r for r in rows if r["network"] == network}
        [first, *_] = found.values()
        for engine in first["milliseconds"]:
            cells = [_number(found[k]["milliseconds"][engine]) if k in found else "" for k in keys]
            cells += [_peak(found[b, 1], engine) if (b, 1) in found else "" for b in sizes]
            lines.append([_network(first) if engine == "native" else "", engine, *cells])
        ratios = [f"{found[k]['ratio']:.2f} ×" if k in found else "" for k in keys]
        lines.append(["", "best dense ÷ native", *ratios, *("" for _ in sizes)])
    return lines


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _peak(row: Report, engine: str) -> str:
    memory = row["memory"][engine]
    return _number((memory["peak"] - memory["before"]) / 1e6)


def _network(row: Report) -> str:
    return f"{_name(row['network'])}, {100 * row['density']:.3g} %, {row['bytes']:,} bytes"


def _name(network: str) -> str:
    return _NAMES.get(network, network)


def layers(report: Report) -> list[list[str]]:
    """Native ÷ dense of each layer at each density, where both are equal, what a weight costs."""
    found = report["details"]["layers"]
    shares = [d for d in next(iter(found.values()))["ratios"] if d not in ("0.5", "0.3")]
    heads = ["layer (kernel/stride, channels, input)", *(f"{100 * float(d):g} %" for d in shares)]
    lines = [[*heads, "even", "ns"]]
    for what, layer in found.items():
        ratios = [f"{layer['ratios'][d]:.2f}" for d in shares]
        lines.append([what, *ratios, f"{layer['even']:.2f}", f"{layer['nanoseconds']:.1f}"])
    return lines


BLOCKS: dict[str, tuple[str, Callable[[Report], list[list[str]]]]] = {
    "densities": ("runtime", densities),
    "batches": ("runtime", batches),
    "layers": ("runtime_layers", layers),
}


def _markdown(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "| --- " * len(rows[0]) + "|", *body])


def with_tables(text: str, tables: dict[str, str]) -> str:
    """`text` with each table between its marks, where it has those."""
    for block, table in tables.items():
        before, mark, rest = text.partition(BEGIN.format(block))
        if mark:
            text = f"{before}{mark}\n{table}\n\n{END}{rest.partition(END)[2]}"
    return text


if __name__ == "__main__":
    main()
