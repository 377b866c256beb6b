"""What a run was made of, written into its folder: settings, versions, weights and data."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import yaml

from data.files import atomic_write
from data.shards.manifest import Manifest
from launcher.cluster.world import World
from launcher.recipe.model import CUT_FILE
from launcher.recipe.recipe import Recipe

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "webdataset", "wandb", "numpy")


def write_provenance(folder: Path, recipe: Recipe, world: World) -> None:
    """`recipe.yaml`, every default filled in, and a line of `environment.jsonl` for this start.

    And a copy of the file that `model.cut` names: a run is whole without it.
    """
    atomic_write(folder / "recipe.yaml", yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    if recipe.model.cut is not None:
        atomic_write(folder / CUT_FILE, recipe.model.cut.read_bytes())
    path = folder / "environment.jsonl"
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    started = {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    atomic_write(path, f"{before}{json.dumps(started | environment(world))}\n")


def write_origin(folder: Path, initial_weights_hash: str, manifest: Manifest) -> None:
    """`origin.json`: what a new run began with, the weights by their hash and the training data."""
    origin = {
        "initial_weights_hash": initial_weights_hash,
        "torch": importlib.metadata.version("torch"),
        "data": {
            "dataset": manifest.dataset,
            "fingerprint": manifest.fingerprint(),
            "samples": manifest.samples,
            "classes": manifest.classes,
            "class_names": manifest.names,
            "image": manifest.image.model_dump(),
            "background": background_of(manifest),
        },
    }
    atomic_write(folder / "origin.json", json.dumps(origin, indent=1, ensure_ascii=False) + "\n")


def background_of(manifest: Manifest) -> str | None:
    """The colour that transparent images were put before when they were packed, if any."""
    return manifest.source.get("options", {}).get("background")


def environment(world: World) -> dict[str, Any]:
    """Versions, git revision and world, as plain values."""
    return {
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.platform(),
        "git": _git_revision(),
        "world_size": world.world_size,
        "started_by": world.source,
    }


def _git_revision() -> str | None:
    """The commit of the code, with `+` where the tree differs from it; None outside a checkout."""
    # Installed from a wheel, it may lie below somebody else's checkout.
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty=+"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
