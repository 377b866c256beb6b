"""The hosts of the tests: do they differ, is what is done to a line what it does, are they gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.network.hosts import Hosts, missing, wait_until

ECHO = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("", 7))
print("up", flush=True)
while True:
    server.sendto(*server.recvfrom(100))
"""
# How many of so many datagrams come back, and how long the quickest took.
ASK = """
import socket, sys, time
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.connect(("n1", 7))
client.settimeout(float(sys.argv[2]))
times = []
for number in range(int(sys.argv[1])):
    began = time.monotonic()
    client.send(b"%d" % number)
    try:
        while client.recv(100) != b"%d" % number:
            pass
    except OSError:
        continue
    times.append(time.monotonic() - began)
print(len(times), min(times, default=0))
"""


def test_each_has_a_name_an_address_and_processes_of_its_own(hosts: Hosts) -> None:
    for host in hosts:
        assert host.run("hostname").strip() == host.name
        assert host.address in host.run("ip", "-brief", "address")
        assert "bash" in host.run("cat", "/proc/1/comm")
    hosts["n0"].knows({"n1": "127.0.1.1"})
    asked = ("getent", "hosts", "n1")
    assert [host.run(*asked).split()[0] for host in hosts] == ["127.0.1.1", hosts["n1"].address]


def test_a_line_is_slow_lossy_or_cut_as_it_is_told(hosts: Hosts, tmp_path: Path) -> None:
    log = tmp_path / "echo.txt"
    hosts.serve(hosts["n1"], log, sys.executable, "-S", "-c", ECHO)
    wait_until(lambda: log.exists() and log.read_text(), 20, "the echo")

    def ask(datagrams: int, patience_s: float) -> tuple[int, float]:
        words = (sys.executable, "-S", "-c", ASK, str(datagrams), str(patience_s))
        count, quickest = hosts["n0"].run(*words).split()
        return int(count), float(quickest)

    assert ask(5, 10)[0] == 5
    hosts.disturb("n1", delay_s=0.05)
    count, quickest = ask(5, 10)
    assert count == 5 and quickest >= 0.1, "there and back"
    # Of a hundred a quarter comes back, 25 ± 13 in three standard deviations; a beat of patience is
    # longer than any answer takes on a machine that is not at a standstill.
    hosts.disturb("n1", loss=0.5)
    count, _ = ask(100, 0.02)
    assert 1 <= count <= 45
    hosts.disturb("n1", cut=True)
    assert ask(2, 0.2)[0] == 0
    hosts.disturb("n1")
    assert ask(5, 10)[0] == 5


def test_nothing_of_them_is_left(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    program = (
        "import sys, time; from pathlib import Path; from tests.network.hosts import Hosts\n"
        f"with Hosts(Path({str(tmp_path)!r}), 'n0', 'n1') as hosts:\n"
        f"    hosts.serve(hosts['n0'], Path({str(tmp_path)!r}) / 'log', 'sleep', '4321')\n"
        "    while not hosts['n0'].processes('4321'):\n"
        "        time.sleep(0.05)\n"
        "    print(*(host.pid for host in hosts), flush=True)\n"
        "    exec(sys.stdin.readline())\n"
    )
    for end in ("raise KeyError\n", "import os; os.kill(os.getpid(), 9)\n"):
        maker = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert maker.stdin is not None and maker.stdout is not None
        first = [int(word) for word in maker.stdout.readline().split()]
        assert len(first) == 2
        inside = [psutil.Process(pid) for pid in first]
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] == ["sleep", "4321"]:
                inside.append(process)
        maker.stdin.write(end)
        maker.stdin.flush()
        assert maker.wait(60) != 0
        gone, alive = psutil.wait_procs(inside, timeout=30)
        assert len(gone) >= 3 and not alive
