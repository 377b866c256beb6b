"""One run over hosts that really differ, and what their network does to it.

Each host has a name, an address, an /etc/hosts and processes of its own; the lines between them are
disturbed. Whatever happens: all hosts end in time, the first cause is said, and the run, continued
where it had to be, is the one that nobody disturbed, bit for bit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.faults.published import Published, difference, series, unequal
from tests.launcher.conftest import finish, free_port, train, wait_until
from tests.network.hosts import Hosts
from tests.network.launchers import Launcher, Run

pytestmark = pytest.mark.long

STEP_TIMEOUT_S, TIMEOUT_S = 12, 30
SETTINGS = (
    "optim.epochs=12",
    "checkpoint.every_steps=10",
    "tracking.log_every=5",
    f"engine.timeout_s={TIMEOUT_S}",
    f"engine.step_timeout_s={STEP_TIMEOUT_S}",
)
# The time-out, and time to clear away; as in the campaign (tests/faults/course.py).
ENDS_WITHIN_S = TIMEOUT_S + 15
# Then launchers that look once a second, and an ssh that gives the other host up after 20 s.
LAUNCHER_ENDS_WITHIN_S = 60
# A start takes ten seconds alone on two cores, and several times that beside other tests.
PATIENCE_S = 240


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, undisturbed: two ranks of one machine."""
    from tests.launcher.conftest import launch

    run_dir = tmp_path_factory.mktemp("alone") / "run"
    code, output = finish(launch(train(recipe, run_dir, *SETTINGS)), 2 * PATIENCE_S)
    assert code == 0, output
    return run_dir


def begin(
    hosts: Hosts,
    recipe: Path,
    run_dir: Path,
    *settings: str,
    launcher: Launcher = "by hand",
    **how: Any,
) -> Run:
    arguments: list[str | Path] = ["--recipe", recipe]
    for setting in (f"run_dir={run_dir}", *SETTINGS, *settings):
        arguments += ["--set", setting]
    return Run(hosts, launcher, arguments, **how)


def assert_as_undisturbed(run_dir: Path, alone: Path) -> None:
    assert unequal(run_dir, alone) == []
    ours, theirs = (series(Published.read(folder).lines) for folder in (run_dir, alone))
    assert difference(ours, theirs) is None


def wait_for_a_checkpoint(run: Run, run_dir: Path) -> None:
    latest = run_dir / "checkpoints" / "latest"
    wait_until(lambda: latest.exists() or not run.is_running, PATIENCE_S, "first checkpoint")
    assert latest.exists(), run.outputs


def errors(*outputs: str) -> list[str]:
    """The lines that say what ended a run, without what a launcher puts before them."""
    lines = (line for output in outputs for line in output.splitlines())
    return [re.sub(r"^n\d: ", "", line) for line in lines if "error: " in line]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["by hand", "torchrun", "deepspeed"])
def test_a_line_that_is_cut_for_good_ends_the_run_on_both_hosts(
    launcher: Launcher, hosts: Hosts, recipe: Path, alone: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    how: dict[str, Any] = {"launcher": launcher}
    if launcher == "deepspeed":
        how["ssh_path"] = hosts.serve_ssh()
    run = begin(hosts, recipe, run_dir, **how)
    wait_for_a_checkpoint(run, run_dir)
    hosts.disturb("n1", cut=True)
    ended = run.finish(LAUNCHER_ENDS_WITHIN_S, ranks_within_s=ENDS_WITHIN_S)
    assert 0 not in ended.codes, ended.outputs
    said = errors(*ended.outputs)
    assert any("nothing went on for 12 s: rank 1 did not answer" in line for line in said), said
    if launcher != "deepspeed":
        # Over ssh nothing of what n1 says comes through.
        assert any("rank 1: nothing went on for 12 s, and rank 0, which" in s for s in said), said
    hosts.disturb("n1")
    ended = begin(hosts, recipe, run_dir, **how).finish(PATIENCE_S)
    assert set(ended.codes) == {0}, ended.outputs
    assert "continues at step" in ended.outputs[0]
    assert_as_undisturbed(run_dir, alone)


@pytest.mark.timeout(900)
def test_a_line_that_is_cut_for_less_than_the_time_out_is_not_noticed(
    hosts: Hosts, recipe: Path, alone: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run = begin(hosts, recipe, run_dir)
    wait_for_a_checkpoint(run, run_dir)
    hosts.disturb("n0", cut=True)
    lines = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(AssertionError):
        wait_until(lambda: not run.is_running, STEP_TIMEOUT_S / 2)
    # At most the update that was being reduced, and its line.
    assert (run_dir / "metrics.jsonl").read_bytes().count(b"\n") <= lines.count(b"\n") + 1
    hosts.disturb("n0")
    ended = run.finish(PATIENCE_S)
    assert ended.codes == [0, 0], ended.outputs
    assert not any("has been at" in output for output in ended.outputs)
    assert_as_undisturbed(run_dir, alone)


@pytest.mark.timeout(900)
def test_a_slow_and_lossy_line_changes_nothing(
    hosts: Hosts, recipe: Path, alone: Path, tmp_path: Path
) -> None:
    hosts.disturb("n1", delay_s=0.01, loss=0.01)
    ended = begin(hosts, recipe, tmp_path / "run").finish(PATIENCE_S)
    assert ended.codes == [0, 0], ended.outputs
    assert_as_undisturbed(tmp_path / "run", alone)


@pytest.mark.timeout(900)
def test_no_watchdog_and_a_line_that_is_cut(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    settings = ("engine.step_timeout_s=0", "engine.timeout_s=10")
    run = begin(hosts, recipe, tmp_path / "run", *settings)
    wait_for_a_checkpoint(run, tmp_path / "run")
    hosts.disturb("n1", cut=True)
    ended = run.finish(10 + 15)
    assert ended.codes == [1, 1]
    for rank, output in enumerate(ended.outputs):
        [line] = errors(output)
        assert f"rank {rank} on n{rank} waited for another longer than engine.timeout_s" in line


@pytest.mark.timeout(900)
def test_a_host_that_cannot_be_reached_from_the_first_on(
    hosts: Hosts, recipe: Path, tmp_path: Path
) -> None:
    hosts.disturb("n1", cut=True)
    port = free_port()
    ended = begin(hosts, recipe, tmp_path / "run", "engine.timeout_s=10", port=port).finish(60)
    assert ended.codes == [1, 1]
    [first], [second] = (errors(output) for output in ended.outputs)
    assert f"not all 2 ranks came to n0, port {port}, within 10 s: rank 1 did not start" in first
    assert re.search(rf"nobody answers at n0, port {port} \((timed out|No route)", second), second


@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["by hand", "deepspeed"])
def test_a_host_without_the_data_says_so_at_once_on_the_first(
    launcher: Launcher, hosts: Hosts, recipe: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    hosts["n1"].run("mount", "--bind", tmp_path / "empty", shards)
    how: dict[str, Any] = {"launcher": launcher}
    if launcher == "deepspeed":
        how["ssh_path"] = hosts.serve_ssh()
    run = begin(hosts, recipe, tmp_path / "run", "engine.timeout_s=600", **how)
    ended = run.finish(PATIENCE_S)
    assert 0 not in ended.codes
    first = errors(ended.outputs[0])[0]
    assert "error: rank 1 on n1: " in first and str(shards) in first, first
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.timeout(900)
def test_names_that_lead_elsewhere(hosts: Hosts, recipe: Path, alone: Path, tmp_path: Path) -> None:
    """The own name is 127.0.1.1 on one, as Debian has it, and an address of a dead line on one."""
    first, second = hosts["n0"], hosts["n1"]
    first.knows({"n0": "127.0.1.1", "n1": second.address})
    second.knows({"n0": first.address, "n1": "10.88.0.2"})
    second.run("ip", "tuntap", "add", "dev", "admin0", "mode", "tap")
    second.run("ip", "address", "add", "10.88.0.2/24", "dev", "admin0")
    second.run("ip", "link", "set", "admin0", "up")
    ended = begin(hosts, recipe, tmp_path / "run").finish(PATIENCE_S)
    assert ended.codes == [0, 0], ended.outputs
    assert_as_undisturbed(tmp_path / "run", alone)


@pytest.mark.timeout(900)
def test_an_interface_that_leads_nowhere_is_named(
    hosts: Hosts, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    ended = begin(hosts, recipe, tmp_path / "run", "engine.timeout_s=10").finish(60)
    assert ended.codes == [1, 1]
    for rank, output in enumerate(ended.outputs):
        said = errors(output)
        assert f"rank {rank} on n{rank} cannot connect to the other ranks over lo" in said[0]


@pytest.mark.timeout(900)
def test_a_port_that_is_taken_on_the_first_host(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    port, ready = free_port(), tmp_path / "ready"
    taken = f"import socket, time; s = socket.create_server(('', {port})); print(1, flush=True)"
    hosts.serve(hosts["n0"], ready, "python3", "-c", f"{taken}; time.sleep(1000)")
    wait_until(lambda: ready.exists() and ready.read_text(), 30, "the port to be taken")
    run = begin(hosts, recipe, tmp_path / "run", "engine.timeout_s=10", port=port)
    ended = run.finish(60)
    assert ended.codes[0] == 2
    assert f"rank 0 cannot listen at any address, port {port}" in errors(ended.outputs[0])[0]
    assert ended.codes[1] == 1
    said = errors(ended.outputs[1])[0]
    assert f"what listens at n0, port {port} does not answer rank 1 as rank 0 does" in said
