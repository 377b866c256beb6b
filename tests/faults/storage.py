"""Faults of the disk: full, and damage to the newest checkpoint."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.faults import RunningFault, Scene, StoppedFault
from tests.faults.ranks import Ranks, wait_for

_PAGE = 4096
_ROOMY, _FILES = 64 * 2**20, 10_000


class FullDisk(RunningFault):
    kind = "full disk while saving"
    what = "the file system of the checkpoints has fewer bytes or inodes left than the next needs"
    phases = ("training", "saving", "evaluation")
    cause = r"No space left|\bfree\b"

    @staticmethod
    def impossible() -> str | None:
        """Why no file system can be mounted here; None if one can."""
        command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"no unshare: {error}"
        return None if result.returncode == 0 else f"mount: {result.stderr.strip()}"

    @contextlib.contextmanager
    def around(self, scene: Scene) -> Iterator[None]:
        """The checkpoints lie on a file system of their own, of 64 MiB."""
        folder, outside = scene.checkpoints, scene.run / "checkpoints.disk"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(outside, ignore_errors=True)
        shutil.copytree(folder, outside)
        options = f"size={_ROOMY},nr_inodes={_FILES}"
        _mount("-t", "tmpfs", "-o", options, "faults", str(folder))
        try:
            shutil.copytree(outside, folder, dirs_exist_ok=True)
            yield
            shutil.rmtree(outside)
            shutil.copytree(folder, outside)
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder)
        outside.rename(folder)

    def strike(self, scene: Scene, ranks: Ranks) -> str:
        """Out of bytes, which a look before writing can see, or out of inodes, which it cannot."""
        folder = scene.checkpoints
        if scene.rng.random() < 0.5:
            left = scene.rng.randint(1, 5)
            _shrink(folder, lambda: f"nr_inodes={_files_used(folder) + left}")
            return f"room for {left} more files"
        sizes = [_size(folder / name) for name in scene.sound()]
        left = scene.rng.randrange(0, max(sizes, default=100_000) * 8 // 10, _PAGE)
        _shrink(folder, lambda: f"size={_bytes_used(folder) + left + _PAGE}")
        return f"{left // 1024} KiB left"

    def wait_end(self, scene: Scene, ranks: Ranks) -> float | None:
        """Until the run has ended, or has said that it cannot save; then there is room again."""
        patience = scene.course.limits.start
        wait_for(lambda: bool(self.said(ranks)) or not ranks.alive(), patience, 0.05)
        ended = ranks.wait_gone(3.0)
        if ended is not None:
            return ended
        before = _pointer(scene)
        _mount("-o", f"remount,size={_ROOMY},nr_inodes={_FILES}", str(scene.checkpoints))
        wait_for(lambda: _pointer(scene) != before or not ranks.alive(), patience, 0.05)
        ranks.ask_to_stop(signal.SIGTERM)
        return ranks.wait_gone(scene.course.limits.end)

    def problems(self, scene: Scene, ranks: Ranks, phase: str) -> list[str]:
        codes = set(ranks.codes())
        allowed = {1, 2, 128 + signal.SIGTERM} | ({0} if scene.finished else set())
        return [] if codes <= allowed else [f"exit codes {codes} after a full disk"]


class Truncate(StoppedFault):
    kind = "truncated checkpoint"
    what = "a random file of the newest checkpoint is cut at a random length"

    def possible(self, scene: Scene) -> bool:
        return len(scene.sound()) > 1

    def strike(self, scene: Scene) -> tuple[str, str | None]:
        name, file = _victim(scene)
        size = file.stat().st_size
        length = scene.rng.randrange(size)
        with file.open("r+b") as opened:
            opened.truncate(length)
        return f"{name}/{file.name}: {length} of {size} bytes", name


class FlipBits(StoppedFault):
    kind = "bit flips in a checkpoint"
    what = "1 to 8 random bits of a random file of the newest checkpoint are inverted"

    def possible(self, scene: Scene) -> bool:
        return len(scene.sound()) > 1

    def strike(self, scene: Scene) -> tuple[str, str | None]:
        name, file = _victim(scene)
        content = bytearray(file.read_bytes())
        bits = scene.rng.sample(range(8 * len(content)), scene.rng.randint(1, 8))
        for bit in bits:
            content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        return f"{name}/{file.name}: {len(bits)} bits", name


def _victim(scene: Scene) -> tuple[str, Path]:
    """The checkpoint a start would use, and a random file of it."""
    name = scene.published().newest(scene.damaged)
    assert name is not None
    folder = scene.checkpoints / name
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    return name, scene.rng.choice(files)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _pointer(scene: Scene) -> str:
    path = scene.checkpoints / "latest"
    return path.read_text() if path.exists() else ""


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _shrink(folder: Path, option: Callable[[], str]) -> None:
    """Mount with less room. It is refused where a checkpoint has grown beyond that meanwhile."""
    for _ in range(50):
        with contextlib.suppress(subprocess.CalledProcessError):
            _mount("-o", f"remount,{option()}", str(folder))
            return
    raise RuntimeError(f"{folder} grows faster than it can be shrunk")


def _bytes_used(folder: Path) -> int:
    return shutil.disk_usage(folder).used


def _files_used(folder: Path) -> int:
    seen = os.statvfs(folder)
    return seen.f_files - seen.f_ffree


def mounts_below(folder: Path) -> list[str]:
    """What is mounted at or below a folder now."""
    points = re.findall(r"^\S+ (\S+)", Path("/proc/mounts").read_text(), re.MULTILINE)
    return [point for point in points if point.startswith(str(folder.resolve()))]
