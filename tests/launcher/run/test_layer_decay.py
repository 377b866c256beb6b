"""`optim.layer_decay`: the learning rates that timm would give, and what cannot have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.errors import UsageError
from launcher.models import create_model
from launcher.recipe.load import load_recipe
from launcher.run.optimizer import build_optimizer


@pytest.mark.parametrize("method", ["scl", "dense"])
def test_each_layer_has_a_share_of_the_next_ones_rate(method: str, smooth: Path) -> None:
    settings = ["optim.layer_decay=0.5", "optim.lr=0.08"]
    settings += ["method={name: dense}"] if method == "dense" else []
    recipe = load_recipe(smooth, settings)
    model = create_model(recipe.model, num_classes=10, in_chans=1)
    method_of_run = recipe.method.for_run(recipe.schedule, 100)
    optimizer = build_optimizer(method_of_run, recipe.optim, model, torch.empty(1, 1, 8, 8))
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {}
    for group in optimizer.param_groups:
        shares = group.get("lr_shares", [1.0] * len(group["params"]))
        for p, share in zip(group["params"], shares, strict=True):
            rates[names[id(p)]] = group["lr"] * share
    assert rates.keys() == {*names.values()}
    # Embeddings, two blocks, the last with the norm behind it, and then the classifier.
    begins = {"cls_token": 0.01, "pos_embed": 0.01, "patch_embed": 0.01, "blocks.0": 0.02}
    begins |= {"blocks.1": 0.04, "norm": 0.04, "head": 0.08}
    for name, rate in rates.items():
        [expected] = [rate for begin, rate in begins.items() if name.startswith(begin)]
        assert rate == pytest.approx(expected, rel=1e-12), name


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["optim.layer_decay=1"], r"optim\.layer_decay: should be a number above 0 and below 1"),
        (["optim.layer_decay=0"], r"optim\.layer_decay: should be a number above 0 and below 1"),
        (
            ["optim.layer_decay=0.7", "method={name: optg, density: 0.2}"],
            r"method optg has one learning rate for all layers: leave optim\.layer_decay out",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], sentence: str, smooth: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_recipe(smooth, settings)


def test_a_model_that_does_not_tell_its_layers_is_refused(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["optim.layer_decay=0.7"])
    model = create_model(loaded.model, num_classes=10, in_chans=1)
    with pytest.raises(UsageError, match=r"optim\.layer_decay: this model does not say which of"):
        build_optimizer(loaded.method, loaded.optim, model, torch.empty(1, 1, 8, 8))
