"""`scl init`: the recipe that one's own images get, without a question."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data.errors import DataError
from data.packing.pack import pack
from data.sources.image_folder import imagefolder
from launcher import cli
from launcher.errors import UsageError
from launcher.recipe.load import build_recipe, load_recipe
from launcher.run.inputs import open_inputs
from launcher.start.first_recipe import first_recipe, next_commands
from launcher.start.look import Look, look_at


def fill(folder: Path, counts: dict[str, int], size: tuple[int, int], mode: str = "L") -> Path:
    """Images of noise in class folders."""
    random = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
            image = Image.fromarray(random.integers(0, 255, shape, np.uint8), mode)
            image.save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_from_a_folder_to_inputs_that_train(here: Path, capsys: pytest.CaptureFixture) -> None:
    """The printed command packs, and what the recipe says can be trained on what it packs."""
    fill(here / "my photos", {"cat": 9, "dog": 15}, (10, 12), "RGBA")
    assert cli.main(["init", "my photos"]) == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    pack_it, train, dense = [line for line in printed if line.startswith("scl ")]
    # Noise is transparent in places, which packing would refuse without being told a colour.
    assert pack_it.endswith("--background white")
    assert cli.main(shlex.split(pack_it)[1:]) == 0
    for command in (train, dense):
        options = cli.parser().parse_args(shlex.split(command)[1:])
        inputs = open_inputs(load_recipe(options.recipe, options.overrides), 1)
        assert inputs.steps_per_epoch == (24 - 3) // 2
    assert "my photos" in (here / "my_photos.yaml").read_text()
    assert cli.main(["init", "my photos"]) == 2
    assert "my_photos.yaml is there already" in capsys.readouterr().err


def test_of_shards(here: Path) -> None:
    images = fill(here / "images", {"a": 20, "b": 20}, (8, 8))
    pack(imagefolder(images, 0.25), here / "shards", progress=False)
    look = look_at(here / "shards")
    assert (look.train, look.val, look.classes, look.side, look.channels) == (30, 10, 2, 8, 1)
    commands = next_commands(look, Path("shards.yaml"))
    assert [command.split()[1] for command in commands] == ["train", "train", "compare"]
    recipe = build_recipe(yaml.safe_load(first_recipe(look, Path("r.yaml"))), (), "r.yaml")
    assert open_inputs(recipe, 1).total_steps >= 60
    # Beside the recipes of a checkout, editors know the keys.
    assert "yaml-language-server" not in first_recipe(look, here / "r.yaml")
    (here / "recipes").mkdir()
    (here / "recipes" / "schema.json").touch()
    line = first_recipe(look, here / "r.yaml").splitlines()[0]
    assert line == "# yaml-language-server: $schema=recipes/schema.json"


@pytest.mark.parametrize(
    ("train", "side", "on_gpu", "model", "image_size"),
    [
        (1_500, 8, False, "small_convnet", 8),
        (50_000, 32, True, "cifar_resnet20", 32),
        (3_000, 30, False, "cifar_resnet20", 32),
        (3_000, 64, True, "resnet18", 64),
        (3_000, 375, False, "resnet18", 96),
        (3_000, 375, True, "resnet18", 224),
        (1_281_167, 375, True, "resnet50", 224),
    ],
)
def test_the_network_suits_the_images(
    train: int, side: int, on_gpu: bool, model: str, image_size: int
) -> None:
    look = Look(Path("x"), False, train, train // 10, 10, side, side, 3, False)
    text = first_recipe(look, Path("x.yaml"), on_gpu=on_gpu)
    recipe = build_recipe(yaml.safe_load(text), (), "x.yaml")
    assert (recipe.model.name, recipe.data.image_size) == (model, image_size)
    assert recipe.method.target == ("target_density", 0.1)
    assert recipe.optim.global_batch_size <= train / 8
    # Every choice has a comment in the line above it, but for those that go with one.
    lines = text.splitlines()
    for key in ("image_size", "target_density", "epochs", "global_batch_size"):
        [place] = [n for n, line in enumerate(lines) if line.startswith(f"  {key}: ")]
        assert lines[place - 1].lstrip().startswith("# "), key
    assert max(map(len, lines)) <= 100


def test_what_cannot_become_a_recipe_is_refused(here: Path) -> None:
    (here / "shards" / "train").mkdir(parents=True)
    (here / "shards" / "train" / "0.tar").touch()
    with pytest.raises(UsageError, match="run `scl pack index shards/train` and `scl pack index"):
        look_at(Path("shards"))
    pack(imagefolder(fill(here / "a", {"x": 4, "y": 4}, (8, 8)), 0.0), here / "p", progress=False)
    with pytest.raises(UsageError, match="p has no val/ to measure on: pack it with one"):
        look_at(Path("p"))
    with pytest.raises(UsageError, match=r"train is one split: give the folder .*, p perhaps"):
        look_at(Path("p/train"))
    with pytest.raises(DataError, match="has one image only"):
        look_at(fill(here / "few", {"x": 5, "y": 1}, (8, 8)))
    with pytest.raises(UsageError, match="there is no folder"):
        look_at(Path("none"))
