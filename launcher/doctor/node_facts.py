"""What one rank finds out about its own node, before it has met any other."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

from data import stream
from launcher.cluster.accelerator import accelerator
from launcher.cluster.world import World
from launcher.folder.provenance import environment
from launcher.recipe.recipe import Recipe

# What training imports; each of them may be broken on one node alone.
_IMPORTED = (
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    "webdataset",
    f"{stream.__name__}.pipeline",
    "sclcore",
)
_TOKEN_WITHIN_S = 10.0


@dataclasses.dataclass(frozen=True)
class Facts:
    """One rank's node; `errors` are sentences, each with what to do about it."""

    rank: int
    host: str
    versions: dict[str, str]
    device: str
    gpu: str | None = None
    driver: str | None = None
    data: str | None = None
    free_gib: float | None = None
    errors: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a rank saw when rank 0 said go: its clock in Unix seconds, and rank 0's token."""

    clock: float
    sees_token: bool
    write_error: str | None


def to_json(value: Facts | Reply) -> str:
    return json.dumps(dataclasses.asdict(value))


def find_facts(world: World, recipe: Recipe) -> Facts:
    """Look at this node. Raises nothing: what fails is among the errors."""
    # DeepSpeed looks for an accelerator when it is imported, and says so.
    os.environ["DS_ACCELERATOR"] = accelerator()
    errors = _import_errors()
    versions = _versions(world, errors)
    device, gpu, driver = ("unknown", None, None) if errors else _device(world, errors)
    return Facts(
        rank=world.rank,
        host=socket.gethostname(),
        versions=versions,
        device=device,
        gpu=gpu,
        driver=driver,
        data=None if errors else _fingerprint(recipe, errors),
        free_gib=_free_gib(recipe.folder, errors),
        errors=tuple(errors),
    )


def place_token(folder: Path) -> Path:
    """A small file in the run's folder, by which other nodes recognise it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".doctor-{secrets.token_hex(8)}"
    token.write_text(token.name, encoding="utf-8")
    return token


def reply_to(token: Path | None) -> Reply:
    """Note the time at once, then look for the token and write beside it."""
    clock = time.time()
    if token is None:
        return Reply(clock, False, None)
    deadline = time.monotonic() + _TOKEN_WITHIN_S
    # Network file systems show a new file after some seconds only.
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    error = None
    if seen:
        answer = token.with_name(f"{token.name}-{socket.gethostname()}-{os.getpid()}")
        try:
            answer.write_text("", encoding="utf-8")
            answer.unlink()
        except OSError as problem:
            error = problem.strerror or str(problem)
    return Reply(clock, seen, error)


def _import_errors() -> list[str]:
    errors = []
    for name in _IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            errors.append(
                f"cannot import {name} ({type(error).__name__}: {' '.join(str(error).split())}): "
                "let all nodes use one environment (SCL_VENV or SCL_CONTAINER)"
            )
    return errors


def _versions(world: World, errors: list[str]) -> dict[str, str]:
    try:
        described = environment(world)
    except Exception as error:
        errors.append(f"cannot tell the versions of packages ({error}): install the environment")
        return {}
    versions = {"python": described["python"], **described["packages"]}
    return versions | {"revision": described["git"] or "no checkout"}


def _device(world: World, errors: list[str]) -> tuple[str, str | None, str | None]:
    import torch

    if accelerator() == "cpu":
        return f"CPU, {len(os.sched_getaffinity(0))} cores", None, None
    count = torch.cuda.device_count()
    number = world.local_rank % count
    properties = torch.cuda.get_device_properties(number)
    try:
        torch.zeros(1, device=f"cuda:{number}").add_(1).item()
    except RuntimeError as error:
        errors.append(
            f"GPU {number} does not compute ({str(error).splitlines()[0]}): look at nvidia-smi on "
            "this node, and exclude the node until it is mended (sbatch --exclude)"
        )
    gib = properties.total_memory / 2**30
    name = f"{properties.name}, {gib:.0f} GiB, {count} visible"
    return name, str(getattr(properties, "uuid", number)), _driver()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split("\n")[0].strip()


def _fingerprint(recipe: Recipe, errors: list[str]) -> str | None:
    """The first digits of the manifests of both splits."""
    from data.errors import DataError
    from data.stream.pipeline import open_split

    try:
        prints = [
            open_split(recipe.data, split).manifest.fingerprint() for split in ("train", "val")
        ]
    except (DataError, OSError) as error:
        errors.append(str(error))
        return None
    return "/".join(text[:8] for text in prints)


def _free_gib(folder: Path, errors: list[str]) -> float | None:
    existing = next((p for p in (folder, *folder.absolute().parents) if p.exists()), Path("/"))
    try:
        return shutil.disk_usage(existing).free / 2**30
    except OSError as error:
        errors.append(f"{existing} does not answer ({error.strerror}): choose another run_dir")
        return None
