"""Runs side by side: `compare_runs` reads and groups them, `show` prints, `write` draws.

comparison = compare_runs(["runs/lambdas"])
show(comparison)
write(comparison, Path("runs/compare"))
"""

from launcher.compare.configurations import Comparison, Configuration, Stat, compare_runs
from launcher.compare.output import check_out, write
from launcher.compare.table import show

__all__ = ["Comparison", "Configuration", "Stat", "check_out", "compare_runs", "show", "write"]
