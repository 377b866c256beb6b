"""Files that come with SCL: recipes, sweeps and Slurm scripts, found from wherever one works."""

from __future__ import annotations

from pathlib import Path

# Beside the package: in a checkout, and in a wheel too.
ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
SLURM = ROOT / "slurm"


def find_recipe(path: Path) -> Path:
    """The file `path`, or, where there is none, SCL's own recipe or sweep that is called so.

    `recipes/digits_scl.yaml` and `digits_scl` mean the same one, `imagenet/resnet18_scl` and
    `resnet18_scl` too. Returns `path` itself where SCL has none, or several, of that name.
    """
    if path.exists() or path.is_absolute():
        return path
    named = path.relative_to("recipes") if path.parts[:1] == ("recipes",) else path
    if named.suffix != ".yaml":
        named = named.with_name(f"{named.name}.yaml")
    if (RECIPES / named).is_file():
        return RECIPES / named
    below = list(RECIPES.rglob(named.name)) if len(path.parts) == 1 else []
    return below[0] if len(below) == 1 else path
