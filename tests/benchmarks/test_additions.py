"""`benchmarks.additions`: an average and a teacher beside SCL without any, split by split."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.additions import DECAYS, TEACHERS, Averages, compared, taught_by
from benchmarks.front_lines import Line
from benchmarks.front_training import Images
from tests.launcher.conftest import finish, launch


def line(name: str, split: int, top1: float, asked: float = 0.05) -> Line:
    return Line(name, asked, split, top1, 0.1, asked, 1.0, "digest", "1 2")


def test_differences_are_of_the_same_split() -> None:
    lines = [line("scl", 0, 0.95), line("scl", 1, 0.97), line("scl teacher 0.5 2", 0, 0.96)]
    lines += [line("scl teacher 0.5 2", 1, 0.99), line("scl ema 0.9", 1, 0.96)]
    found = compared([*lines, line("dense", 0, 0.99, 1.0)])
    assert found.keys() == {"100 %", "5 %"}
    more = found["5 %"]["scl teacher 0.5 2"]["more"]
    assert (more["points"], more["error"], more["runs"]) == (1.5, 0.5, 2)
    # Of the one split that it has been run on.
    assert found["5 %"]["scl ema 0.9"]["more"]["points"] == -1.0


def test_the_average_and_the_teacher_are_the_launcher_s() -> None:
    linear = nn.Linear(4, 2, bias=False)
    model, weight = nn.Sequential(nn.Flatten(), linear), linear.weight
    averages = Averages()
    with torch.no_grad():
        weight.copy_(torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1]]))
        averages.after_update(model)
        weight.copy_(torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 0]]))
        averages.after_update(model)
    # After one update each decays by 2 / 11, and a dead connection is dead in the average.
    seen = {decay: weight.detach().clone() for decay in averages.in_turn()}
    assert tuple(seen) == DECAYS
    for average in seen.values():
        assert average[0, 0].item() == pytest.approx(3 - 2 * 2 / 11) and average[1, 3] == 0
    assert weight[0, 0].item() == 3
    images = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    of = Images(images, torch.arange(6) % 2, torch.arange(6), torch.arange(6), 0)
    loss = taught_by(model, of, *TEACHERS[0])
    outputs = model(images)
    # A student that says what the teacher says has nothing to learn of it.
    assert loss(outputs, images, torch.tensor(1.0)).item() == pytest.approx(0.5)
    assert loss(-outputs, images, torch.tensor(1.0)).item() > 0.6


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_last_line_is_the_comparison(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.additions", "--quick", "--folder", str(tmp_path)]
    for _ in range(2):
        code, output = finish(launch(command), timeout=350)
        assert code == 0, output
    found = json.loads(output.splitlines()[-1])["details"]["digits"]
    assert found["10 %"].keys() >= {"scl", "scl ema 0.99", "scl teacher 0.5 2 ema 0.9"}
    # Again, it had nothing left to train.
    lines = (tmp_path / "digits.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * (2 + len(TEACHERS)) * (1 + len(DECAYS))
