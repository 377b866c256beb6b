"""Recipes: typed, validated once, every mistake one sentence that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launcher.errors import UsageError
from launcher.recipe.describe import describe
from launcher.recipe.load import load_recipe
from launcher.recipe.recipe import Recipe, resume_difference
from sclcore.methods.scl import SCLMethod
from tests.launcher.conftest import ROOT

MINIMAL = {
    "name": "r",
    "model": {"name": "small_convnet"},
    "data": {"path": "shards", "image_size": 8},
    "method": {"name": "scl", "lam": 0.1},
    "optim": {"global_batch_size": 64, "epochs": 1, "lr": 0.1},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_of_the_house_is_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("method.lamb=1", "unknown key 'method.lamb'; did you mean 'lam'?"),
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'; valid here: "),
        ("optim.lr_=1", "unknown key 'optim.lr_'; did you mean 'lr'?"),
        ("shedule.lr=cosine", "unknown key 'shedule'; did you mean 'schedule'?"),
        ("schedule.lr_warm_up=0.1", "did you mean 'lr_warmup'?"),
        ("data.worker=1", "did you mean 'workers'?"),
        ("tracking.wandbb=off", "did you mean 'wandb'?"),
        ("lam=0.1", "unknown key 'lam'; did you mean 'method.lam'?"),
        ("epochs=3", "unknown key 'epochs'; did you mean 'optim.epochs'?"),
        ("method.lr=3", "unknown key 'method.lr'; did you mean 'optim.lr' or 'schedule.lr'?"),
        ("optim.freeze_mask_at=1", "did you mean 'schedule.freeze_masks_at'?"),
        ("xyz=1", "unknown key 'xyz'; valid here: name, run_dir, seed, model, "),
        ("method={name: dense, lam: 1}", "'method.lam' with method.name dense: it is of scl"),
        ("method.exclude=conv1", "method.exclude: should be a list, not 'conv1'; write exclude: ["),
        ("optim.betas=0.9", "optim.betas: should be a list, not 0.9"),
        ("model=resnet18", "model: should be a mapping of keys to values, not 'resnet18'; write"),
        ("model=resnet18", "; write model.name=resnet18"),
        ("method=scl", "method: should be a mapping of keys to values, not 'scl'; write method.n"),
        ("method.lam=-0.1", "method.lam: input should be greater than or equal to 0, not -0.1"),
        ("method.lam=much", "method.lam: input should be a valid number"),
        ("method.name=magic", "or package.module:Class of your own, not 'magic'"),
        ("optim.epochs=0", "optim.epochs: input should be greater than or equal to 1, not 0"),
        ("method.proxy=step", "method.proxy: input should be 'identity'"),
        ("schedule.lr_milestones=[2]", "lr_milestones are shares of the run"),
        ("engine.precision=half", "engine.precision: input should be 'fp32', 'autocast' or 'bf16'"),
        ("engine.precision=fp16", "engine.precision: fp16 needs loss scaling"),
        ("engine.zero_stage=3", "engine.zero_stage: stage 3 takes the parameters away"),
        ("engine.zero_stage=4", "engine.zero_stage: input should be 0, 1 or 2, not 4"),
        ("engine.offload=cpu", "unknown key 'engine.offload'"),
        ("name=a/b", "name: string should match pattern"),
        ("method", "--set method: write it as key.sub=value"),
        ("a..b=1", "--set a..b=1: write it as key.sub=value"),
        ("a.b=[1", "the value is not valid YAML"),
    ],
)
def test_a_mistake_is_one_sentence(setting: str, sentence: str, file: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(file, [setting])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "optim"}))
    with pytest.raises(UsageError, match="the key 'optim' is missing"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1", "holds no recipe"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        load_recipe(path)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the recipe .*No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_overrides_and_words_mean_what_they_say(file: Path) -> None:
    settings = ["method.lam=1e-3", "tracking.wandb=off", "method.exclude=[classifier]"]
    settings.append("method.n_m=2:4")
    recipe = load_recipe(file, settings)
    assert isinstance(recipe.method, SCLMethod)
    assert recipe.method.lam == 1e-3
    assert recipe.method.exclude == ["classifier"]
    assert recipe.tracking.wandb == "off"
    assert recipe.method.n_m == "2:4", "YAML 1.1 reads 124, in base 60"


def test_base_is_below_and_a_renamed_block_is_replaced(file: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(
        yaml.safe_dump(
            {"base": file.name, "name": "c", "method": {"name": "dense"}, "optim": {"lr": 0.5}}
        )
    )
    recipe = load_recipe(child)
    assert recipe.method.model_dump() == {"name": "dense"}
    assert (recipe.optim.lr, recipe.optim.epochs) == (0.5, 1)


def test_overrides_hold_wherever_the_name_of_their_block_is_set(file: Path) -> None:
    """Before, what was said of the method ahead of its name was dropped without a word."""
    said = ["method.exclude=[conv1]", "method.name=magnitude", "method.density=0.1"]
    for overrides in (said, said[::-1]):
        method = load_recipe(file, overrides).method
        assert (method.name, getattr(method, "exclude", None)) == ("magnitude", ["conv1"])
    with pytest.raises(UsageError, match="lam"):
        load_recipe(file, ["method.lam=0.1", "method.name=dense"])


def test_a_missing_base_is_asked_for_by_somebody(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: none.yaml\n")
    with pytest.raises(UsageError, match=r"a\.yaml: base: none\.yaml is no file, looked for at /"):
        load_recipe(tmp_path / "a.yaml")


def test_bases_that_go_round_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UsageError, match="comes back to itself"):
        load_recipe(tmp_path / "a.yaml")


def test_a_resolved_recipe_reads_back_the_same(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    assert load_recipe(resolved) == recipe


@pytest.mark.parametrize(
    ("setting", "difference"),
    [
        ("method.lam=0.2", "method.lam is 0.2 here and 0.1 there"),
        ("engine.precision=bf16", "engine.precision is 'bf16' here and 'fp32' there"),
        ("seed=1", "seed is 1 here and 0 there"),
        ("engine.ranks=4", None),
        ("engine.zero_stage=2", None),
        ("engine.max_micro_batch=8", None),
        ("data.workers=2", None),
        ("data.path=elsewhere", None),
        ("data.max_corrupt_fraction=0.5", None),
        ("method={name: dense}", "method.name is 'dense' here and 'scl' there"),
        ("model.kwargs={width: 4}", "model.kwargs.width is 4 here and not set there"),
        ("tracking.wandb=off", None),
        ("run_dir=elsewhere", None),
    ],
)
def test_what_may_differ_on_resume(setting: str, difference: str | None, file: Path) -> None:
    saved = load_recipe(file).as_dict()
    assert resume_difference(saved, load_recipe(file, [setting])) == difference


def test_describe_has_every_key() -> None:
    text = describe()
    for key in ("method.lam", "optim.global_batch_size", "schedule.freeze_masks_at", "data.path"):
        assert f"{key} (" in text, key
    missing = [line for line in text.splitlines() if line.endswith("): ")]
    assert missing == [], "keys without a description"


def test_every_section_of_a_recipe_is_described() -> None:
    for name in Recipe.model_fields:
        assert any(line.startswith(name) for line in describe().splitlines()), name
