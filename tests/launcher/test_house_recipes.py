"""The recipes of recipes/imagenet, cifar and mnist: all valid, feasible at full size, and they run.

Full size is the meta device's: shapes without memory. Two real updates are made of each network,
dense and under SCL, on small images of noise; the largest networks are made smaller (`reduced`).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data.config import DataConfig
from data.packing.pack import pack
from data.sources.source import ArrayReader, Source
from data.stream.plan import BatchPlan
from launcher.models import model_on_meta
from launcher.recipe.engine import accumulation_steps
from launcher.recipe.load import load_recipe
from launcher.recipe.recipe import Recipe
from launcher.run.optimizer import build_optimizer
from launcher.start.sweep import load_sweep, plan_sweep
from sclcore import SCL
from tests import forkserver
from tests.launcher.conftest import ROOT, environment

# Training images, their shards as `scl pack` makes them, classes, channels.
SETS: dict[str, tuple[int, int, int]] = {
    "runs/data/imagenet": (1_281_167, 1000, 3),
    "runs/data/cifar10": (50_000, 10, 3),
    "runs/data/cifar100": (50_000, 100, 3),
    "runs/data/mnist": (60_000, 10, 1),
}
LONG = pytest.mark.long
FOLDERS = ("imagenet", "cifar", "mnist")
RECIPES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / "recipes" / folder).glob("*.yaml")
    if not path.stem.startswith("_") and path.stem != "sweep"
)
NETWORKS = [
    *("resnet18", "resnet50", "resnet50_16", "resnet50_40", "mobilenetv2", "efficientnet_b0"),
    *("vit_s16", "deit_b16", "deit_l16", "convnext_t"),
    *(f"{n}_cifar{c}" for n in ("resnet20", "resnet56", "vgg16_bn", "wrn28_10") for c in (10, 100)),
    *("lenet_300_100", "lenet5_caffe"),
]


def shard_sizes(samples: int) -> tuple[int, ...]:
    full, rest = divmod(samples, 5000)
    return (5000,) * full + ((rest,) if rest else ())


def test_every_network_is_there_dense_and_under_scl() -> None:
    assert {path.stem for path in RECIPES} == {
        f"{network}_{method}" for network in NETWORKS for method in ("dense", "scl")
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_model_optimizer_and_plan_at_full_size(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem and path.stem.endswith(f"_{recipe.method.name}")
    samples, classes, channels = SETS[str(recipe.data.path)]
    batch, ranks = recipe.optim.global_batch_size, recipe.engine.ranks
    sizes = {recipe.data.image_size, recipe.data.smallest_training_size}
    for size in sizes:
        model, image = model_on_meta(
            recipe.model, num_classes=classes, in_chans=channels, image_size=size
        )
    optimizer = build_optimizer(
        recipe.method.for_run(recipe.schedule, 1000), recipe.optim, model, image
    )
    optimized = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in model.parameters()}
    accumulation = accumulation_steps(batch, ranks, recipe.engine.max_micro_batch)
    plan = BatchPlan(
        shard_sizes=shard_sizes(samples),
        seed=0,
        global_batch_size=batch,
        world_size=ranks,
        accumulation=accumulation,
    )
    assert not recipe.data.mixing or plan.micro_batch_size % 2 == 0
    if isinstance(optimizer, SCL):
        assert optimizer.connection_sizes()
        check_pace(recipe, plan.steps_per_epoch * recipe.optim.epochs)


def check_pace(recipe: Recipe, updates: int) -> None:
    """What docs/recipes.md says: a connection without gradient dies in 0.3 of the time."""
    assert recipe.method.mask_lr == "auto"  # type: ignore[attr-defined]
    method: Any = recipe.method.for_run(recipe.schedule, updates)
    learning = updates * recipe.schedule.freeze_masks_at
    dies = method.mask_init * (1 - method.mask_momentum) / (method.lam * method.mask_lr)
    assert dies / learning == pytest.approx(0.3)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_sweep_has_three_lambdas_of_each(folder: str) -> None:
    path = ROOT / "recipes" / folder / "sweep.yaml"
    names = [run.name for run in plan_sweep(load_sweep(path), path)]
    recipes = [p.stem for p in RECIPES if p.parent.name == folder]
    for stem in recipes:
        runs = [name for name in names if name.startswith(f"{stem}-")]
        assert len(runs) == (3 if stem.endswith("_scl") else 1), stem
    assert len(names) == 2 * len(recipes)


def test_each_head_says_source_and_result() -> None:
    for path in RECIPES:
        text = path.read_text()
        head = text[: text.index("base:")]
        assert "Result:" in head, path
        values = yaml.safe_load(text)
        own_lr = "lr" in values.get("optim", {}) and "16_dense" not in values["base"]
        assert not own_lr or "arXiv" in head or "pycls" in head or "ffcv" in head, path


@pytest.mark.parametrize("network", ["resnet50", "vit_s16", "lenet5_caffe"])
def test_the_document_has_the_tables_that_its_command_makes(network: str) -> None:
    path = ROOT / "docs" / "recipes_table.py"
    spec = importlib.util.spec_from_file_location("recipes_table", path)
    assert spec is not None and spec.loader is not None
    made: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    title = "CIFAR and MNIST" if "lenet" in network else "ImageNet"
    row = made.table(title, [network], made.basis_of()).splitlines()[-1]
    assert row in (ROOT / "docs" / "recipes.md").read_text().splitlines()


def shards(folder: Path, channels: int) -> Path:
    """Forty images of noise for training and twenty for evaluation, in ten classes."""
    generator = np.random.default_rng(0)
    side = 40 if channels == 3 else 28
    readers = {}
    for split, count in (("train", 40), ("val", 20)):
        shape = (count, side, side, 3) if channels == 3 else (count, side, side)
        images = generator.integers(0, 256, shape, np.uint8)
        readers[split] = ArrayReader(images, np.arange(count) % 10)
    pack(Source("noise", "noise", [*"0123456789"], readers), folder, progress=False)
    return folder


def reduced(recipe: Recipe, folder: Path) -> list[str]:
    """Settings under which two updates take seconds; all else is the recipe's."""
    channels = SETS[str(recipe.data.path)][2]
    settings = [
        f"data.path={folder / ('colour' if channels == 3 else 'grey')}",
        *("data.workers=0", "optim.global_batch_size=4", "optim.epochs=2"),
        *("engine.ranks=1", "tracking.wandb=off"),
    ]
    if recipe.data.image_size > 32:
        settings.append("data.image_size=32")
    if recipe.model.name == "cifar_wrn28_10":
        settings.append("model.kwargs.width=2")
    if recipe.model.name == "convnext_tiny":
        settings.append("model.kwargs.depths=[1, 1, 3, 1]")
    if recipe.data.progressive is not None:
        settings += ["data.image_size=64", "data.progressive.start=32"]
    if recipe.model.name.startswith("vit_"):
        # 86 M and 304 M parameters with their state are more than there is room and time for here:
        # the widths are real, the depth is not.
        settings.append("model.kwargs.img_size=32")
        if "small" not in recipe.model.name:
            settings.append("model.kwargs.depth=2")
    return settings


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    shards(folder / "colour", 3)
    shards(folder / "grey", 1)
    return folder


@pytest.mark.parametrize("method", ["scl", pytest.param("dense", marks=LONG)])
@pytest.mark.parametrize(
    "folders", [pytest.param(("imagenet",), marks=LONG), ("cifar", "mnist")], ids="-".join
)
def test_two_updates_of_every_network(folders: tuple[str, ...], method: str, noise: Path) -> None:
    chosen: dict[str, Recipe] = {}
    for path in RECIPES:
        # CIFAR-100 and 40 epochs are other numbers of the same program.
        same = "cifar100" in path.stem or "resnet50_40" in path.stem
        wanted = path.parent.name in folders and path.stem.endswith(f"_{method}")
        if wanted and not same:
            chosen[str(path)] = load_recipe(path)
    arguments = [f"{path}={json.dumps(reduced(r, noise))}" for path, r in chosen.items()]
    result = forkserver.run(
        [sys.executable, "-m", "tests.launcher.recipe_worker", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.keys() == chosen.keys()
    for path, seen in found.items():
        recipe, name = chosen[path], Path(path).stem
        assert len(seen["losses"]) == 2
        assert seen["finite"] and all(0 < norm < float("inf") for norm in seen["norms"]), name
        assert seen["moved"] == seen["tensors"], name
        if recipe.method.name == "scl":
            assert seen["optimizer"] == "SCL"
            assert seen["updates"] == [2] * len(seen["updates"])
            assert seen["masks_moved"] == seen["masks"] > 0, name
        else:
            assert seen["optimizer"] == {"sgd": "SGD", "adamw": "AdamW"}[recipe.optim.name]


def test_progressive_sizes_of_the_short_runs() -> None:
    """FFCV: 160 pixels until 11 of 16 epochs, 192 from 13 on, or 29 and 34 of 40."""
    for epochs, small, full in ((16, 5, 13), (40, 12, 34)):
        recipe = load_recipe(ROOT / f"recipes/imagenet/resnet50_{epochs}_scl.yaml")
        data: DataConfig = recipe.data
        assert recipe.optim.epochs == epochs
        assert {data.training_size(epoch, epochs) for epoch in range(small)} == {160}
        assert {data.training_size(epoch, epochs) for epoch in range(full, epochs)} == {192}
