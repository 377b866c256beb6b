"""Recipes: typed, validated once, every mistake one sentence that names the key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from launcher.errors import UsageError
from launcher.recipe.describe import as_yaml, describe
from launcher.recipe.keys import EXAMPLES, all_keys
from launcher.recipe.kinds import choices_of
from launcher.recipe.load import build_recipe, load_recipe
from launcher.recipe.recipe import Recipe, flatten, resume_difference
from launcher.recipe.schema import as_text
from launcher.recipe.yaml import Loader
from sclcore.methods.scl import SCLMethod
from sclcore.registry import known_methods
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


RECIPES = [p for p in sorted((ROOT / "recipes").rglob("*.yaml")) if "sweep" not in p.name]
SCHEMA = ROOT / "recipes" / "schema.json"


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if p.parent == SCHEMA.parent], ids=lambda p: p.stem
)
def test_every_recipe_of_the_house_is_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("method.lamb=1", "unknown key 'method.lamb'; did you mean 'lam'?"),
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'; did you mean 'optim.lr'?"),
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
        (
            "method.exclude=conv1",
            "method.exclude: should be a list of text, not 'conv1'; write exclude: [conv1]",
        ),
        (
            "optim.betas=0.9",
            "optim.betas: should be a list of 2 numbers, not 0.9; such as betas: [0.9, 0.999]",
        ),
        ("model=resnet18", "model: should be a mapping of keys to values, not 'resnet18'; write"),
        ("model=resnet18", "; write model.name=resnet18"),
        ("method=scl", "method: should be a mapping of keys to values, not 'scl'; write method.n"),
        ("method.lam=-0.1", "method.lam: should be a number of at least 0 or null, not -0.1"),
        (
            "method.lam=much",
            "lam: should be a number of at least 0 or null, not 'much'; such as lam: 0.1",
        ),
        ("method.name=magic", "or package.module:Class of your own, not 'magic'"),
        ("optim.epochs=0", "optim.epochs: should be a whole number of at least 1, not 0"),
        (
            "method.proxy=step",
            "method.proxy: should be identity, leaky_relu, softplus, relu or clipped, not",
        ),
        ("schedule.lr_milestones=[2]", "lr_milestones are shares of the run"),
        ("engine.precision=half", "engine.precision: should be fp32, autocast or bf16, not 'half'"),
        ("engine.precision=fp16", "engine.precision: fp16 needs loss scaling"),
        ("engine.zero_stage=4", "engine.zero_stage: should be 0, 1, 2 or 3, not 4"),
        ("engine.offload=cpu", "unknown key 'engine.offload'"),
        ("name=a/b", "name: should be a word of letters, digits, '.', '_' and '-', not 'a/b'"),
        (
            "method.granularity=5",
            "granularity: should be text or a mapping of patterns to text, not",
        ),
        ("schedule.lr_milestones=[a]", "lr_milestones: should be a list of numbers, not 'a'; such"),
        ("optim.betas=[1]", "optim.betas: should be a list of 2 numbers, not [1]; such as betas"),
        ("optim.epochs=null", "should be a whole number of at least 1, not null"),
        ("engine.precision=autocat", "not 'autocat'; did you mean autocast?"),
        ("method.target_density=2", "should be a number above 0 and below 1 or null, not 2"),
        ("data.progressive=64", "should be a mapping of keys to values or null, not 64"),
        ("optim.batch_size=3", "did you mean 'global_batch_size'?"),
        ("sparsity=0.9", "unknown key 'sparsity'; did you mean 'method.target_density'?"),
        ("method={name: rigl}", "the key 'method.density' is missing; write density: 0.1"),
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
        ("engine.zero_stage=3", None),
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


NOT_FOR_PEOPLE = re.compile(
    r"0x[0-9a-f]{6}|<|NoneType|ModelConfig|instance of|\\b(str|int|float|bool|dict|tuple)\\b|"
    r"[Ii]nput should|valid (string|number|integer|list|dictionary)|unable to parse|\\bValue error"
)


@pytest.mark.parametrize("given", ["[[1]]", "{a: [b]}", "2026-11-30", "x y", "-7", "1.5", "null"])
def test_no_wrong_value_of_any_key_is_answered_in_the_words_of_a_library(
    given: str, file: Path
) -> None:
    refused = 0
    for key in all_keys():
        if key.path == "method.name":
            continue
        method = {}
        if key.method is not None:
            fields = known_methods()[key.method].model_fields
            method = {n: EXAMPLES.get(f"method.{n}") for n in fields if fields[n].is_required()}
            method |= known_methods()[key.method].example or {}
            method["name"] = key.method
        progressive = ["data.progressive.start=8"] if "data.progressive." in key.path else []
        overrides = [f"method={json.dumps(method)}"] if method else []
        try:
            load_recipe(file, [*progressive, *overrides, f"{key.path}={given}"])
        except UsageError as error:
            refused += 1
            said = str(error).partition(f"{file}: ")[2]
            assert not NOT_FOR_PEOPLE.search(said), f"{key.path}={given}: {said}"
            assert "\n" not in said, said
    assert refused > 30


@pytest.mark.parametrize("text", ["a:\tb\n\tc: d", "a: b: c"])
def test_a_file_that_is_not_yaml_is_said_where(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"r\.yaml is not valid YAML: line \d+, column \d+: "):
        load_recipe(path)
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UsageError, match="is not valid YAML: it is not text in UTF-8"):
        load_recipe(path)


# --- for people and editors to read ---


def test_the_page_has_every_key_with_its_choices() -> None:
    text = describe()
    for key in all_keys():
        assert f"  {key.path} (" in text, key
        assert key.about, f"{key.path} has no description"
        assert all(str(choice) in key.kind for choice in choices_of(key.field.annotation)), key
    assert "engine.precision (fp32, autocast or bf16; default fp32)" in text
    assert "base: other.yaml" in text
    assert max(map(len, text.splitlines())) <= 140
    for section in Recipe.model_fields:
        assert any(line.strip().startswith(section) for line in text.splitlines()), section


def test_the_page_of_one_key_or_section() -> None:
    assert describe("optim.lr").startswith("  optim.lr (a number above 0; required)\n")
    assert describe("optim").startswith("optim: ") and "method." not in describe("optim")
    assert describe("method.lam").count("method.lam (") == 4, "of each method that has it"
    with pytest.raises(UsageError, match="no key or section 'optim"):
        describe("optim.lt")


@pytest.mark.parametrize("method", [*known_methods()])
def test_the_complete_recipe_of_a_method_is_one(method: str, tmp_path: Path) -> None:
    """Every key stands there, and all that has a default has that."""
    text = as_yaml(method)
    path = tmp_path / "all.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    said = dict(flatten(yaml.safe_load(text)))
    for key in all_keys():
        if key.method in (None, method) and not key.path.startswith(
            ("data.progressive.", "distill.")
        ):
            assert key.path in said, key.path
    ours = [k for k in all_keys() if k.method in (None, method) and k.path in said]
    values = {
        k.path: said[k.path]
        for k in ours
        if k.field.is_required() or (k.default is None and said[k.path] is not None)
    }
    values["method.name"] = method
    assert recipe == build_recipe({}, [f"{k}={json.dumps(v)}" for k, v in values.items()], "x")
    # The mapping that is null may be taken out of its comment.
    taken = re.sub(r"(?m)^  progressive: null\n", "", text)
    taken = re.sub(r"(?m)^  # (progressive:|  (start|until|step): .*)$", r"  \1", taken)
    path.write_text(taken)
    assert load_recipe(path).data.progressive is not None


def test_there_is_no_recipe_of_an_unknown_method() -> None:
    with pytest.raises(UsageError, match="there is no method 'sgd' to write a recipe for: choose"):
        as_yaml("sgd")


def test_the_schema_in_the_repository_is_that_of_the_code() -> None:
    assert SCHEMA.read_text() == as_text(), "scl recipe --schema > recipes/schema.json"


def test_the_schema_takes_what_recipes_are_and_refuses_what_they_are_not() -> None:
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    seen = 0
    for path in RECIPES:
        values = yaml.load(path.read_text(), Loader=Loader)
        if path.name.startswith("_") or "runs" in values:
            continue
        assert [e.message for e in validator.iter_errors(values)] == [], path
        first = path.read_text().splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema="), path
        assert (path.parent / first.partition("=")[2]).resolve() == SCHEMA, path
        seen += 1
    assert seen > 40
    for section, key, value in (
        ("optim", "epochs", 0),
        ("method", "lamb", 1),
        ("engine", "precision", "half"),
        ("data", "image_size", None),
    ):
        wrong = {**MINIMAL, section: {**MINIMAL.get(section, {}), key: value}}
        assert not validator.is_valid(wrong), (section, key)
    assert not validator.is_valid({k: v for k, v in MINIMAL.items() if k != "optim"})
    assert validator.is_valid(MINIMAL)
