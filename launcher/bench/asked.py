"""What is to be measured."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import UsageError


@dataclass(frozen=True)
class Asked:
    """What to measure: batch sizes, threads (None: one per core), how often, on what."""

    batches: tuple[int, ...] = (1, 32)
    threads: int | None = None
    rounds: int = 30
    device: str | None = None

    def check(self) -> None:
        """Raises UsageError."""
        for option, value in (("--batch", min(self.batches)), ("--rounds", self.rounds)):
            if value < 1:
                raise UsageError(f"{option} is {value}; it must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads is {self.threads}; it must be at least 1")
