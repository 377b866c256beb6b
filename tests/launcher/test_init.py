"""What a new run starts from: weights, masks, and the structure of another run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file
from timm.models import adapt_input_conv
from torch import nn

from data.shards.manifest import Manifest, load_manifest
from launcher.errors import UsageError
from launcher.models import create_model
from launcher.recipe.load import load_recipe
from launcher.recipe.recipe import Recipe, resume_difference
from launcher.run.initial import (
    Initial,
    first_masks,
    hash_weights,
    initial_model,
    magnitude_masks,
    read_initial,
)
from launcher.run.optimizer import build_optimizer
from launcher.start.retrain import retrain_recipe
from sclcore import SCL
from sclcore.layout.geometry import Geometry
from tests.launcher.conftest import finish, launch, mask_variables, scl, summary

VIT = ["model.name=test_vit", "model.kwargs={img_size: 16, patch_size: 4}"]


@pytest.fixture
def manifest(shards: Path) -> Manifest:
    return load_manifest(shards / "train")


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def weights_of(recipe: Recipe, classes: int = 10, channels: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(123)
    return create_model(recipe.model, num_classes=classes, in_chans=channels).state_dict()


# --- weights ---


def test_published_weights_of_timm(recipe: Path, manifest: Manifest, tmp_path: Path) -> None:
    """From a local copy: three colours and five classes become grey and ten."""
    published = weights_of(load_recipe(recipe, VIT), classes=5, channels=3)
    torch.save(published, tmp_path / "vit.pt")
    overlay = f"{{file: {tmp_path}/vit.pt, num_classes: 5}}"
    settings = [*VIT, "init.weights=timm-pretrained"]
    here = load_recipe(recipe, [*settings, f"model.kwargs.pretrained_cfg_overlay={overlay}"])
    initial = read_initial(here, manifest)
    assert initial.notes == (
        "init.weights: the classifier head is for 5 classes there and 10 here: it starts anew",
    )
    model = initial_model(here, manifest, initial)
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(model.state_dict()[name], published[name])
    # The classifier is drawn from the run's seed, as without anything published.
    own = initial_model(here, manifest, Initial()).state_dict()
    assert torch.equal(model.state_dict()["head.weight"], own["head.weight"])
    assert not torch.equal(own[name], published[name])


def test_weights_of_a_file(recipe: Path, manifest: Manifest, tmp_path: Path) -> None:
    """As torch, as safetensors, and as training programs wrap them."""
    here = load_recipe(recipe)
    state = weights_of(here)
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        there = load_recipe(recipe, [f"init.weights={tmp_path / name}"])
        found = read_initial(there, manifest).weights
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_classifier_for_other_classes_starts_anew(
    recipe: Path, manifest: Manifest, tmp_path: Path
) -> None:
    state = weights_of(load_recipe(recipe), classes=7)
    torch.save(state, tmp_path / "seven.pt")
    here = load_recipe(recipe, [f"init.weights={tmp_path}/seven.pt"])
    initial = read_initial(here, manifest)
    assert [note.partition(" is for ")[2] for note in initial.notes] == [
        f"7 classes in {tmp_path}/seven.pt and 10 here: it starts anew"
    ]
    model = initial_model(here, manifest, initial).state_dict()
    assert torch.equal(model["features.0.weight"], state["features.0.weight"])
    assert model["classifier.weight"].shape[0] == 10


@pytest.mark.parametrize(("there", "here"), [(3, 1), (1, 3)])
def test_timms_weights_for_other_images_and_classes_are_turned_to_these(
    there: int, here: int, recipe: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """The file of a pretrained network as timm publishes it: 3 channels, 1,000 classes."""
    ours = load_recipe(recipe, ["model.name=resnet10t", f"init.weights={tmp_path}/r.pt"])
    ours.model.kwargs.clear()
    published = weights_of(ours, classes=1000, channels=there)
    torch.save(published, tmp_path / "r.pt")
    sizes = {"channels": here, "mean": [0.5] * here, "std": [0.5] * here}
    images = manifest.model_copy(update={"image": manifest.image.model_copy(update=sizes)})
    initial = read_initial(ours, images)
    how = "summed over them" if here == 1 else "repeated and scaled"
    where = f"in {tmp_path}/r.pt and"
    assert initial.notes == (
        f"init.weights: conv1.0 is for images of {there} channels {where} {here} here: {how}",
        f"init.weights: the classifier fc is for 1000 classes {where} 10 here: it starts anew",
    )
    model = initial_model(ours, images, initial).state_dict()
    first = published["conv1.0.weight"]
    expected = adapt_input_conv(1, first.clone()) if here == 1 else first.repeat(1, 3, 1, 1) / 3
    # The sum may be rounded in another order.
    torch.testing.assert_close(model["conv1.0.weight"], expected)
    assert torch.equal(model["layer1.0.conv1.weight"], published["layer1.0.conv1.weight"])
    assert model["fc.weight"].shape[0] == 10


def test_weights_without_a_classifier(recipe: Path, manifest: Manifest, tmp_path: Path) -> None:
    here = load_recipe(recipe, [f"init.weights={tmp_path}/w.pt"])
    body = {k: v for k, v in weights_of(here).items() if not k.startswith("classifier.")}
    torch.save(body, tmp_path / "w.pt")
    initial = read_initial(here, manifest)
    assert initial.notes == (
        f"init.weights: the classifier classifier is not in {tmp_path}/w.pt: it starts anew",
    )
    assert initial.weights.keys() == body.keys()


def _lacking(state: dict[str, torch.Tensor]) -> None:
    del state["features.3.weight"]


def _foreign(state: dict[str, torch.Tensor]) -> None:
    state["extra.weight"] = torch.ones(2)


def _reshaped(state: dict[str, torch.Tensor]) -> None:
    state["features.0.weight"] = torch.ones(8, 3, 5, 5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_lacking, "it lacks features.3.weight; give weights of the same model"),
        (_foreign, "unknown to the model: extra.weight;"),
        (_reshaped, "features.0.weight is 8×3×5×5 there and 8×1×3×3 here"),
    ],
)
def test_weights_of_another_model_are_refused(
    change, sentence: str, recipe: Path, manifest: Manifest, tmp_path: Path
) -> None:
    here = load_recipe(recipe, [f"init.weights={tmp_path}/w.pt"])
    state = weights_of(here)
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=sentence):
        read_initial(here, manifest)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["init.weights={tmp}/none.pt"], "init.weights: there is no file or folder .*none.pt"),
        (["init.weights={tmp}/text.pt"], "text.pt cannot be read as weights"),
        (["init.weights={tmp}/numbers.pt"], "numbers.pt holds 'epoch', which is no tensor"),
        (["init.weights={tmp}"], "init.weights: .* is no usable checkpoint"),
        (["init.weights=timm-pretrained"], "small_convnet is not one of timm's models"),
        (
            [
                *VIT,
                "init.weights=timm-pretrained",
                "model.kwargs.pretrained_cfg_overlay={file: none.pt}",
            ],
            "weights that timm publishes for test_vit could not be loaded .*set init.weights to",
        ),
        (["init.masks={tmp}/small.pt"], "does not fit this model: features.0.weight is missing"),
        (
            ["method={name: dense}", "init.masks=magnitude"],
            "magnitude needs mask variables, and method dense has none",
        ),
    ],
)
def test_what_cannot_be_started_from(
    settings: list[str], sentence: str, recipe: Path, manifest: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "small.pt")
    values = yaml.safe_load(recipe.read_text())
    if any("dense" in setting for setting in settings):
        values["method"] = {"name": "dense"}
        settings = settings[1:]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    here = load_recipe(tmp_path / "r.yaml", [s.replace("{tmp}", str(tmp_path)) for s in settings])
    with pytest.raises(UsageError, match=sentence):
        read_initial(here, manifest)


def test_a_file_that_would_run_code_is_refused(
    recipe: Path, manifest: Manifest, tmp_path: Path
) -> None:
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    torch.save({"w": Malicious()}, tmp_path / "evil.pt")
    here = load_recipe(recipe, [f"init.weights={tmp_path}/evil.pt"])
    with pytest.raises(UsageError, match=r"evil\.pt cannot be read as weights"):
        read_initial(here, manifest)
    assert not (tmp_path / "pwned").exists()


def test_the_seed_of_weights_can_be_another(recipe: Path, manifest: Manifest) -> None:
    def weights(*settings: str) -> str:
        return hash_weights(initial_model(load_recipe(recipe, settings), manifest, Initial()))

    assert weights("seed=4") == weights("seed=9", "init.seed=4") != weights("seed=9")


# --- masks ---


def test_magnitude_is_relative_to_the_feature() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.1, 0.1], [0.0, 0.0]])
    masks = magnitude_masks(weight, Geometry("w", (3, 2)))
    expected = torch.tensor([[0.5, 1.5], [1.0, 1.0], [1.0, 1.0]])
    # Each is a quotient of two floats.
    torch.testing.assert_close(masks, expected)


def test_magnitude_of_kernels_and_of_transposed_convolutions() -> None:
    weight = torch.rand(4, 3, 2, 2) + 0.1
    kernels = magnitude_masks(weight, Geometry("w", (4, 3, 2, 2), unit=4))
    assert all(kernel.unique().numel() == 1 for kernel in kernels.flatten(0, 1))
    torch.testing.assert_close(
        kernels[:, :, 0, 0], weight.mean((2, 3)) / weight.mean((1, 2, 3))[:, None]
    )
    # Two groups of two inputs and three features: a feature's weights lie in both inputs.
    transposed = magnitude_masks(weight, Geometry("w", (4, 3, 2, 2), transposed_groups=2))
    features = transposed.view(2, 2, 3, 4).transpose(1, 2).reshape(6, 8)
    torch.testing.assert_close(features.mean(1), torch.ones(6))


def test_features_with_one_mask_are_compared_within_the_layer() -> None:
    weight = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    masks = magnitude_masks(weight, Geometry("w", (2, 2), unit=2))
    torch.testing.assert_close(masks, torch.tensor([[0.5, 0.5], [1.5, 1.5]]))


@pytest.mark.usefixtures("one_rank")
def test_masks_from_a_file_keep_its_zeros_dead(
    recipe: Path, manifest: Manifest, tmp_path: Path
) -> None:
    here = load_recipe(recipe, [f"init.masks={tmp_path}/w.pt", "method.mask_init=0.5"])
    state = weights_of(here)
    state["features.3.weight"][:, :2] = 0
    torch.save(state, tmp_path / "w.pt")
    initial = read_initial(here, manifest)
    model = initial_model(here, manifest, initial)
    optimizer = build_optimizer(
        here.method.for_run(here.schedule, 100), here.optim, model, torch.empty(1, 1, 8, 8)
    )
    masks = first_masks(optimizer, here.init, initial)
    assert masks.keys() == {n for n, p in model.named_parameters() if p.ndim > 1}
    assert masks["features.3.weight"][:, :2].unique().tolist() == [-0.5]
    assert masks["features.3.weight"][:, 2:].unique().tolist() == [0.5]
    assert not initial.weights, "its weights are not asked for"


def _sparse(recipe: Path, folder: Path, classes: int = 10) -> dict[str, torch.Tensor]:
    state = weights_of(load_recipe(recipe), classes=classes)
    for name in ("features.3.weight", "classifier.weight"):
        state[name].view(-1)[::2] = 0
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    return state


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("classes", [10, 7])
@pytest.mark.parametrize("key", ["init.weights", "init.masks"])
def test_a_sparse_source_keeps_its_zeros(
    key: str, classes: int, recipe: Path, manifest: Manifest, tmp_path: Path
) -> None:
    """Whatever its classes: a classifier that starts anew has all its connections."""
    state = _sparse(recipe, tmp_path / "run", classes)
    here = load_recipe(recipe, [f"{key}={tmp_path / 'run'}"])
    initial = read_initial(here, manifest)
    notes = "\n".join(initial.notes)
    assert ("it starts anew" in notes) == (classes != 10)
    kept = "is sparse, .* of it is live: its zeros start dead .init.masks=uniform would"
    assert bool(re.search(kept, notes)) == (key == "init.weights")
    model = initial_model(here, manifest, initial)
    optimizer = build_optimizer(
        here.method.for_run(here.schedule, 100), here.optim, model, torch.empty(1, 1, 8, 8)
    )
    masks = first_masks(optimizer, here.init, initial)
    assert torch.equal(masks["features.3.weight"] > 0, state["features.3.weight"] != 0)
    head = (
        state["classifier.weight"] != 0
        if classes == 10
        else torch.ones_like(masks["classifier.weight"])
    )
    assert torch.equal(masks["classifier.weight"] > 0, head.bool())


@pytest.mark.usefixtures("one_rank")
def test_masks_stay_uniform_from_a_dense_source_or_where_that_is_said(
    recipe: Path, manifest: Manifest, tmp_path: Path
) -> None:
    _sparse(recipe, tmp_path / "run")
    torch.save(weights_of(load_recipe(recipe)), tmp_path / "dense.pt")
    uniform = [f"init.weights={tmp_path / 'run'}", "init.masks=uniform"]
    for settings in ([f"init.weights={tmp_path}/dense.pt"], uniform):
        here = load_recipe(recipe, settings)
        initial = read_initial(here, manifest)
        model = initial_model(here, manifest, initial)
        optimizer = build_optimizer(
            here.method.for_run(here.schedule, 100), here.optim, model, torch.empty(1, 1, 8, 8)
        )
        assert first_masks(optimizer, here.init, initial) == {} and not initial.notes


def test_another_method_says_that_it_keeps_no_zeros(
    recipe: Path, manifest: Manifest, tmp_path: Path
) -> None:
    _sparse(recipe, tmp_path / "run")
    values = yaml.safe_load(recipe.read_text()) | {"method": {"name": "dense"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    here = load_recipe(tmp_path / "r.yaml", [f"init.weights={tmp_path / 'run'}"])
    [note] = read_initial(here, manifest).notes
    assert "is sparse, " in note and "and method dense does not keep its zeros: scl does" in note


def test_weights_can_be_kept_as_they_began(recipe: Path) -> None:
    """Pruning from random weights: only masks, biases and norms learn."""
    here = load_recipe(recipe, ["method.train_weights=false", "method.mask_lr=0.05"])
    torch.manual_seed(0)
    model = create_model(here.model, num_classes=10, in_chans=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(
        here.method.for_run(here.schedule, 100), here.optim, model, torch.empty(1, 1, 8, 8)
    )
    images, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert isinstance(optimizer, SCL)
    learned = optimizer.masks()
    for name, parameter in model.named_parameters():
        if name in learned:
            assert torch.equal(parameter, before[name] * learned[name])
        else:
            assert not torch.equal(parameter, before[name])
    assert (
        0 < sum(int(m.sum()) for m in learned.values()) < sum(m.numel() for m in learned.values())
    )


# --- the structure of another run ---


@pytest.fixture(scope="module")
def retrained(smooth_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The structure of the smooth run with its initial weights and another order, under ZeRO."""
    folder = tmp_path_factory.mktemp("retrained") / "run"
    settings = ["engine.zero_stage=1", "optim.epochs=1", f"run_dir={folder}"]
    command = scl("retrain", smooth_run, "--weights", "initial", "--seed", "5", "--ranks", "2")
    for setting in settings:
        command += ["--set", setting]
    code, output = finish(launch(command))
    assert code == 0, output
    return folder, output


def test_retraining_keeps_the_structure_and_begins_with_the_same_weights(
    smooth_run: Path, retrained: tuple[Path, str]
) -> None:
    folder, output = retrained
    origin, own = (json.loads((f / "origin.json").read_text()) for f in (smooth_run, folder))
    assert own["initial_weights_hash"] == origin["initial_weights_hash"]
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.seed == 5 and recipe.init.seed == 0 and recipe.init.masks == str(smooth_run)
    assert recipe.schedule.freeze_masks_at == 0 and recipe.optim.epochs == 1
    found, kept = (load_file(f / "model.safetensors") for f in (smooth_run, folder))
    for name, mask in mask_variables(folder).items():
        assert torch.equal(mask > 0, found[name] != 0), name
        assert torch.equal(kept[name] != 0, found[name] != 0), name
        assert not torch.equal(kept[name], found[name]), name
    assert summary(folder)["live"] == summary(smooth_run)["live"]
    assert "nothing-moving" not in output and "lambda-too-large" not in output


def test_retraining_again_continues_and_another_run_is_left_alone(
    smooth_run: Path, retrained: tuple[Path, str]
) -> None:
    folder, _ = retrained
    same = ["optim.epochs=1", f"run_dir={folder}"]
    assert retrain_recipe(smooth_run, "initial", 5, same).folder == folder
    with pytest.raises(UsageError, match=r"is another run's: .*; choose another folder"):
        retrain_recipe(smooth_run, "final", 5, same)


@pytest.mark.parametrize("weights", ["new", "final"])
def test_the_other_weights_to_begin_with(weights, smooth_run: Path) -> None:
    recipe = retrain_recipe(smooth_run, weights)
    assert recipe.name == f"smooth-{weights}" and recipe.folder.parent == smooth_run.parent
    assert recipe.seed == (1 if weights == "new" else 0)
    assert recipe.init.weights == ("random" if weights == "new" else str(smooth_run))
    manifest = load_manifest(Path(str(recipe.data.path)) / "train")
    initial = read_initial(recipe, manifest)
    origin = json.loads((smooth_run / "origin.json").read_text())
    model = initial_model(recipe, manifest, initial)
    assert hash_weights(model) != origin["initial_weights_hash"]
    final = load_file(smooth_run / "model.safetensors")
    assert (weights == "final") == all(
        torch.equal(value, final[name]) for name, value in model.state_dict().items()
    )


def test_what_cannot_be_retrained(smooth_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", "origin.json"):
        shutil.copy(smooth_run / name, run)
    with pytest.raises(UsageError, match=r"holds no model\.safetensors"):
        retrain_recipe(run, "new")
    shutil.copy(smooth_run / "model.safetensors", run)
    origin = json.loads((run / "origin.json").read_text())
    (run / "origin.json").write_text(json.dumps(origin | {"initial_weights_hash": "0"}))
    with pytest.raises(UsageError, match=r"cannot be made again here .*PyTorch was"):
        retrain_recipe(run, "initial")
    (run / "origin.json").unlink()
    with pytest.raises(UsageError, match=r"origin\.json cannot be read"):
        retrain_recipe(run, "initial")
    values = yaml.safe_load((run / "recipe.yaml").read_text()) | {"method": {"name": "dense"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match="dense network: it has no structure"):
        retrain_recipe(run, "new")


# --- continuing ---


def test_a_checkpoint_from_before_init_existed_still_continues(recipe: Path) -> None:
    here = load_recipe(recipe)
    saved = here.as_dict()
    del saved["init"]
    assert resume_difference(saved, here) is None
    # What a run wrote before `auto` was the default.
    then = here.as_dict() | {"init": {"weights": "run", "masks": "uniform", "seed": None}}
    assert resume_difference(then, load_recipe(recipe, ["init.weights=run"])) is None
    assert here.init.masks == "uniform", "as ever, where there is no network to begin with"
    other = load_recipe(recipe, ["init.masks=magnitude"])
    assert resume_difference(saved, other) == "init.masks is 'magnitude' here and 'uniform' there"


def test_a_conv1d_group_is_understood() -> None:
    """Features along the second dimension: those of a transposed layer."""
    weight = torch.rand(5, 3)
    masks = magnitude_masks(weight, Geometry("w", (5, 3), transposed_groups=1))
    torch.testing.assert_close(masks, weight / weight.mean(0))
