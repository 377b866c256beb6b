"""Who waits says for whom, for how long, and until when."""

from __future__ import annotations

import itertools
import re
import socket
import sys
from pathlib import Path

import pytest

from launcher.terminal import Waiting, moments
from tests.launcher.conftest import Start, finish, scl
from tests.ports import free_port


def test_a_rank_that_is_missing_is_named_while_it_is_waited_for(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    """Rank 0 without rank 1, and beside it a rank 1 without rank 0."""
    alone = {}
    for rank in (0, 1):
        command = [sys.executable, "-m", "launcher.train", "--recipe", str(recipe)]
        command += ["--set", f"run_dir={tmp_path}/{rank}", "engine.timeout_s=10"]
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        alone[rank] = start(command, **world, **place)
    (code, said), (other_code, other_said) = (finish(alone[rank]) for rank in (0, 1))
    where = r"127\.0\.0\.1, port \d+"
    assert code == other_code == 1
    assert re.search(
        rf"waiting for rank 1 of 2 at {where}: [56] s so far, at most 10 s \(engine", said
    ), said
    assert "within 10 s: rank 1 did not start, or ended" in said
    assert re.search(rf"rank 1 waits for rank 0 at {where}: \d+ s so far, at most 10 s", other_said)
    assert "nobody answers at 127.0.0.1" in other_said


def test_a_rank_that_cannot_come_and_a_port_of_somebody_else(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    """Rank 0 whose rank 1 has no data, and beside them a rank 1 that meets another program."""
    command = [sys.executable, "-m", "launcher.train", "--recipe", str(recipe)]
    world = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as other:
        lost = start(
            [*command, "--set", f"run_dir={tmp_path}/lost", "engine.timeout_s=10"],
            RANK="1",
            MASTER_PORT=str(other.getsockname()[1]),
            **world,
        )
        port = free_port()
        settings = ["--set", f"run_dir={tmp_path}/run", "engine.timeout_s=600"]
        waits = start([*command, *settings], RANK="0", MASTER_PORT=port, **world)
        without = [*command, *settings, f"data.path={tmp_path}/none"]
        refused = start(without, RANK="1", MASTER_PORT=port, **world)
        (code, said), (other_code, other_said) = finish(waits), finish(refused)
        assert code == other_code == 2
        sentence = f"there is no folder {tmp_path}/none/train"
        assert f"error: rank 1 on {socket.gethostname()}: {sentence}" in said
        assert f"error: rank 1: {sentence}" in other_said
        code, said = finish(lost)
        assert code == 1 and "does not answer rank 1 as rank 0 does: another program" in said


# Rank 0 has opened the store, and others come before it has said anything there.
HESITATES = """
import sys, time
from launcher.cluster import rendezvous
from launcher.cluster.process import end_process
from launcher.train import main
opened = rendezvous.open_store
def open_store(*arguments):
    store = opened(*arguments)
    time.sleep(3)
    return store
rendezvous.open_store = open_store
end_process(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("program", [["-m", "launcher.train"], ["-c", HESITATES]])
def test_a_rank_0_that_will_not_train_tells_those_that_come(
    program: list[str], recipe: Path, tmp_path: Path, start: Start
) -> None:
    """Without it rank 1 would wait for ten minutes for somebody who has ended."""
    arguments = ["--recipe", str(recipe), "--set", f"run_dir={tmp_path}/run"]
    arguments += ["engine.timeout_s=600"]
    world = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = free_port()
    missing = f"data.path={tmp_path}/none"
    refused = start([sys.executable, *program, *arguments, missing], RANK="0", **world)
    comes = start([sys.executable, "-m", "launcher.train", *arguments], RANK="1", **world)
    (code, said), (other_code, other_said) = finish(refused), finish(comes)
    assert code == other_code == 2, said + other_said
    sentence = f"there is no folder {tmp_path}/none/train"
    assert f"error: {sentence}" in said
    assert f"error: rank 1: rank 0 on {socket.gethostname()}: {sentence}" in other_said


def test_nothing_is_said_of_what_is_done_soon(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Waiting("blinking"):
        pass
    assert capsys.readouterr().err == ""
    # Where the first words come at once.
    with Waiting("blinking", ", at most a day", first=0.0) as waiting:
        waiting._closed.wait(0.5)
    assert capsys.readouterr().err == "blinking: 0 s so far, at most a day\n"


def test_the_first_words_come_soon_and_those_of_a_night_are_few() -> None:
    said = []
    for moment in moments():
        if moment > 8 * 3600:
            break
        said.append(moment)
    assert said[0] == 5 and len(said) < 500
    assert all(later > earlier for earlier, later in itertools.pairwise(said))


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    before = sorted(tmp_path.rglob("*"))
    command = scl("train", "--recipe", recipe, "--ranks", "2", "--set", f"run_dir={tmp_path}/run")
    longer = ["--set", "optim.epochs=24", "--dry-run", "--forecast"]
    code, said = finish(start([*command, *longer]))
    assert code == 0, said
    for line in (
        r"run +.*/run: new",
        r"data +.*: 1,437 images to train on, 360 to evaluate, 10 classes",
        r"model +small_convnet: 4,258 parameters, 4,168 connections, .* MACs an image",
        r"batch +2 rank\(s\) × 1 × 48 = 96 images an update",
        r"updates +24 epochs × 14 = 336; 93 images of each are left out",
        r"method +scl, λ = 0.3; masks learn in the first 202 updates",
        r"memory +[\d.]+ kB a rank for weights, gradients and optimizer; about [\d.]+ kB for",
        r"disk +about [\d.]+ kB a checkpoint, at most 6 of them",
        r" +0\.3 +[\d.]+ % +[\d.]+ %",
        r"All checks passed; nothing was written\.",
    ):
        assert re.search(f"(?m)^{line}", said), f"{line}\n{said}"
    assert sorted(tmp_path.rglob("*")) == before
    code, said = finish(start([*command, "--dry-run", "--set", "method.lam=-1"]))
    assert code == 2 and "method.lam: should be" in said
    code, said = finish(start([*command, "--forecast"]))
    assert code == 2 and "--forecast goes with --dry-run" in said
