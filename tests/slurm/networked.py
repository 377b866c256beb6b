"""The same Slurm with a network: the controller and each node are hosts of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.network.hosts import Hosts
from tests.slurm.cluster import NODES, Slurm

CONTROLLER = "head"


class NetworkedSlurm(Slurm):
    """A running cluster in `hosts`, of which the lines can be disturbed."""

    controller = CONTROLLER
    # Slurm's own default: ranks notice sooner.
    node_timeout_s = 300

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.hosts = Hosts(folder, CONTROLLER, *NODES)

    def __enter__(self) -> NetworkedSlurm:
        self.hosts.__enter__()
        try:
            super().__enter__()
        except BaseException:
            self.hosts.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.hosts.__exit__(None, None, None)
        finally:
            super().__exit__()

    def address(self, node: str) -> str:
        return self.hosts[node].address

    def at_controller(self, command: Sequence[str], folder: Path) -> Sequence[str]:
        return self.hosts[CONTROLLER].command(*command, folder=folder)

    def at_node(self, node: str, command: Sequence[str]) -> Sequence[str]:
        return self.hosts[node].command(*command)
