"""What is to be measured."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import UsageError


@dataclass(frozen=True)
class Asked:
    """What to measure: batch sizes, threads (None: one per core), how often, on what, and whether
    memory as well, which takes a process for each number."""

    batches: tuple[int, ...] = (1, 32)
    threads: tuple[int, ...] | None = None
    rounds: int = 30
    device: str | None = None
    memory: bool = False

    def check(self) -> None:
        """Raises UsageError."""
        least = {"--batch": min(self.batches), "--rounds": self.rounds}
        if self.threads is not None:
            least["--threads"] = min(self.threads)
        for option, value in least.items():
            if value < 1:
                raise UsageError(f"{option} is {value}; it must be at least 1")
