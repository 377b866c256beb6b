"""Faults of processes: killed, asked to stop, frozen."""

from __future__ import annotations

import re
import signal

from tests.faults.faults import RunningFault, Scene
from tests.faults.ranks import Ranks, clean


class KillRank(RunningFault):
    kind = "kill -9, one rank"
    what = "SIGKILL to a random rank"
    # By hand nobody sees the signal: the other rank says that it lost a peer.
    cause = (
        r"killed by SIGKILL|ends because another rank did|has ended or did not start|"
        r"did not start, or ended|one has just ended|"
        r"rank 0, which keeps the rendezvous at .* has ended"
    )

    def strike(self, scene: Scene, ranks: Ranks) -> str:
        found = ranks.ranks()
        if not found:
            # `scl train` has not forked them yet, or those started by hand have not begun.
            ranks.kill_all()
            return "no rank yet: the launcher was killed"
        number = scene.rng.choice(sorted(found))
        found[number].kill()
        return f"rank {number}"

    def cause_problems(self, ranks: Ranks) -> list[str]:
        return [] if ranks.codes() == [-signal.SIGKILL] else super().cause_problems(ranks)

    def problems(self, scene: Scene, ranks: Ranks, phase: str) -> list[str]:
        if 0 in ranks.codes() and not scene.finished:
            return [f"exit codes {ranks.codes()} after a kill"]
        return []


class KillAll(RunningFault):
    kind = "kill -9, everything"
    what = "SIGKILL to all ranks and the launcher"

    def strike(self, scene: Scene, ranks: Ranks) -> str:
        ranks.kill_all()
        return "all processes"


class KillLauncher(RunningFault):
    kind = "kill -9, the launcher"
    what = "SIGKILL to `scl train`; the ranks live"
    launcher = "scl train"
    phases = ("training", "saving", "evaluation")
    cause = r"stopped by SIGTERM at step"

    def strike(self, scene: Scene, ranks: Ranks) -> str:
        ranks.kill_launchers()
        return "scl train"

    def cause_problems(self, ranks: Ranks) -> list[str]:
        # Close to the end they finish before they look.
        if "sparse model" in ranks.output():
            return []
        return super().cause_problems(ranks)


class AskToStop(RunningFault):
    """SIGTERM, SIGUSR1: saved, and said."""

    number: signal.Signals

    def strike(self, scene: Scene, ranks: Ranks) -> str:
        ranks.ask_to_stop(self.number)
        return "to scl train" if ranks.launcher == "scl train" else "to every rank"

    def problems(self, scene: Scene, ranks: Ranks, phase: str) -> list[str]:
        codes, code = set(ranks.codes()), 128 + self.number
        if scene.finished and codes == {0}:
            return []
        # Until the ranks listen, a signal does what it does to any process; nothing is lost then.
        allowed = {code} if phase != "start-up" else {code, -self.number, 1}
        return [] if codes <= allowed else [f"exit codes {codes} instead of {allowed}"]

    def cause_problems(self, ranks: Ranks) -> list[str]:
        codes = set(ranks.codes())
        # Killed by the signal before it listened: the shell says which signal it was.
        if codes == {0} or codes == {-self.number}:
            return []
        said = self.said(ranks)
        if self.number.name in said:
            return []
        return [f"{self.number.name} is not named: {said or clean(ranks.output())[-1:]}"]


class Terminate(AskToStop):
    kind = "SIGTERM"
    what = "SIGTERM, to `scl train` or to every rank"
    number = signal.SIGTERM


class User1(AskToStop):
    kind = "SIGUSR1"
    what = "SIGUSR1, to `scl train` or to every rank"
    number = signal.SIGUSR1


class Freeze(RunningFault):
    kind = "a rank does not respond"
    what = "SIGSTOP to a random rank"
    # Before the second update a step may take minutes (compilers, data workers): no watchdog yet.
    phases = ("training", "saving", "evaluation")

    def strike(self, scene: Scene, ranks: Ranks) -> str:
        found = ranks.ranks()
        self._frozen = scene.rng.choice(sorted(found))
        found[self._frozen].suspend()
        return f"rank {self._frozen}"

    def said(self, ranks: Ranks) -> str:
        # Stacks of the ranks that wait come first; the verdict is the line with "error:".
        return next((line for line in clean(ranks.output()) if "error:" in line), "")

    def cause_problems(self, ranks: Ranks) -> list[str]:
        said = self.said(ranks)
        if re.search(rf"rank {self._frozen}\b.*did not answer", said):
            return []
        return [f"rank {self._frozen} is not named: {said or 'there is no error line'}"]

    def problems(self, scene: Scene, ranks: Ranks, phase: str) -> list[str]:
        if 0 in ranks.codes() and not scene.finished:
            return [f"exit codes {ranks.codes()} though a rank was frozen"]
        return []
