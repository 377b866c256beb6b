"""What a run shows on a terminal, and in a log."""

from __future__ import annotations

import io
import re
import time

import pytest

from launcher.run import display
from launcher.run.display import Display

SERIES = {
    "train/loss": 0.1234,
    "train/top1": 0.95,
    "connections/density": 0.0352,
    "speed/images_per_s": 12_345.6,
    "masks/flips": 3.0,
}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_batch_system(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def run(stream: io.StringIO, epochs: int = 2, steps: int = 6, pause: float = 0.0) -> str:
    """All that `epochs` epochs show, with a logged interval of three steps."""
    shown = Display(epochs, steps, stream=stream)
    for epoch in range(epochs):
        shown.start_epoch(epoch, 0)
        for step in range(steps):
            time.sleep(pause)
            shown.step()
            if step % 3 == 2:
                shown.interval(SERIES)
        shown.end_epoch(SERIES, {"val/top1": 0.9944})
    shown.close()
    return stream.getvalue()


def test_a_log_gets_a_line_for_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    output = run(io.StringIO())
    assert not CONTROL.search(output)
    within, first, *_ = lines = output.splitlines()
    assert len(lines) == 4, "one within each epoch and one at its end"
    assert within.startswith("epoch   1/2  step 3/6  loss 0.123  train top-1  95.00%")
    assert "density   3.52%  12,346 images/s  left 0:00, run 0:00" in within
    assert first.startswith("epoch   1/2  loss 0.123  top-1  99.44%  density   3.52%")
    assert "left" not in lines[-1]


def test_a_log_gets_no_more_lines_than_one_in_a_while() -> None:
    assert [line[:11] for line in run(io.StringIO()).splitlines()] == ["epoch   1/2", "epoch   2/2"]


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "CI"])
def test_batch_systems_get_plain_lines_whatever_the_terminal(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    assert not CONTROL.search(run(Terminal()))


def test_a_terminal_gets_a_bar_for_each_epoch() -> None:
    # A bar is drawn ten times a second at most.
    output = run(Terminal(), pause=0.11)
    assert output.count("\r") > 2
    assert any(part.startswith("epoch 1/2 |") and "4/6" in part for part in output.split("\r"))
    shown = r"loss 0.123 top-1 95.00% density 3.52% left 0:0\d, run 0:0\d 12,346 images/s"
    assert re.search(shown, output)
    assert "epoch   2/2  loss 0.123  top-1  99.44%" in output
    # Nothing of a bar is left standing behind.
    assert output.rsplit("\r", 1)[-1].strip() == "" or output.endswith("images/s\n")


def test_what_is_not_known_is_not_shown() -> None:
    stream = io.StringIO()
    shown = Display(1, 2, stream=stream)
    shown.start_epoch(0, 0)
    shown.end_epoch({"train/loss": float("nan")}, {"val/top1": 0.5})
    assert stream.getvalue() == "epoch   1/1  top-1  50.00%\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0:00"), (65, "1:05"), (7200, "2:00:00"), (3 * 86400 + 4 * 3600 + 61, "3 d 04:01:01")],
)
def test_clock(seconds: float, text: str) -> None:
    assert display._clock(seconds) == text


def test_time_left_counts_what_lies_between_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    stream = io.StringIO()
    # Continues at step 4 of 3 × 10.
    shown = Display(3, 10, done=4, stream=stream)
    shown.start_epoch(0, 4)
    for _ in range(2):
        now += 20
        shown.step()
    shown.interval(SERIES)
    assert "left 1:20, run 8:00" in stream.getvalue()
