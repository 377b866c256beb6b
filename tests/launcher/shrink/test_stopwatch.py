"""Milliseconds as multiples of what the network took before."""

from __future__ import annotations

import torch
from torch import nn

from launcher.shrink.stopwatch import Stopwatch


def test_calls_are_timed_beside_the_network_and_it_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 400)).train()
    images = torch.randn(64, 400)
    threads = torch.get_num_threads()
    stopwatch = Stopwatch(model, images, rounds=5)
    twice = nn.Sequential(model, model)
    found = stopwatch({"one": lambda: model(images), "two": lambda: twice(images)})
    # Processor time, beside other tests: far from exact, but once is not twice.
    assert 0.5 < found["one"] / stopwatch.today < 1.5 < found["two"] / stopwatch.today < 4
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert torch.get_num_threads() == threads
    # Given what it took then, it counts in that.
    later = Stopwatch(model, images, rounds=5, today=1000.0)
    assert 500 < later({0: lambda: model(images)})[0] < 1500
    several = Stopwatch(model, images, rounds=2, threads=2)
    assert several.clock != stopwatch.clock and several.today > 0
    assert len(stopwatch.on_the_wall(lambda: model(images))) == 2
