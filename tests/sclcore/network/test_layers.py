"""Layers whose weight is computed from other parameters are not left dense without a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from sclcore import SCL, connection_groups
from sclcore.network.connections import find_connections
from tests.sclcore.nets import Mlp, mlp, mlp_batches, train


def _by_hook(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


def _spectral(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.spectral_norm(layer)


def _pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


Change = Callable[[nn.Module], object]
DERIVED: dict[str, tuple[Change, str]] = {
    "weight_norm": (_by_hook, "torch.nn.utils.remove_weight_norm(layer)"),
    "spectral_norm": (_spectral, "torch.nn.utils.remove_spectral_norm(layer)"),
    "weight_norm, parametrized": (
        parametrizations.weight_norm,
        'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")',
    ),
    "spectral_norm, parametrized": (
        parametrizations.spectral_norm,
        'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")',
    ),
    "prune": (_pruned, 'torch.nn.utils.prune.remove(layer, "weight")'),
}


def _with_first_layer(change: Change) -> Mlp:
    model = mlp()
    change(model.first)
    return model


@pytest.mark.parametrize("kind", DERIVED)
def test_it_is_refused_by_name_with_what_to_do(kind: str) -> None:
    change, undo = DERIVED[kind]
    model = _with_first_layer(change)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^0.weight would stay dense") as error:
        connection_groups(model)
    said = str(error.value)
    assert undo in said and "name them in exclude" in said and "\n" not in said
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", DERIVED)
@pytest.mark.parametrize("pattern", ["0", "0.weight"])
def test_it_stays_dense_where_it_is_excluded(kind: str, pattern: str) -> None:
    model = _with_first_layer(DERIVED[kind][0])
    groups = connection_groups(model, exclude=[pattern])
    assert [name for name, _ in groups[0]["params"]] == ["2.weight"]
    assert [each.name for each in find_connections(model)] == ["2.weight"]


def test_what_the_sentence_says_works() -> None:
    plain = _with_first_layer(DERIVED["prune"][0])
    prune.remove(plain.first, "weight")
    hooked = _with_first_layer(DERIVED["weight_norm"][0])
    nn.utils.remove_weight_norm(hooked.first)
    parametrized = _with_first_layer(DERIVED["weight_norm, parametrized"][0])
    parametrize.remove_parametrizations(parametrized.first, "weight")
    for model in (plain, hooked, parametrized):
        names = [name for name, _ in connection_groups(model)[0]["params"]]
        assert names == ["0.weight", "2.weight"]


def test_a_pruned_network_is_trained_further_with_its_masks() -> None:
    """As docs/library.md says: `prune.remove`, then the zeros as masks that stay."""
    model = _with_first_layer(DERIVED["prune"][0])
    prune.remove(model.first, "weight")
    zeros = model.first.weight == 0
    assert int(zeros.sum()) == 64
    optimizer = SCL(connection_groups(model), lr=0.05, lam=0.0, mask_lr=0.0)
    optimizer.set_masks({"0.weight": model.first.weight != 0})
    train(model, optimizer, mlp_batches(20))
    assert torch.equal(model.first.weight == 0, zeros)


def test_frozen_layers_stay_dense_as_any_frozen_layer() -> None:
    for change, _ in DERIVED.values():
        model = _with_first_layer(change)
        model.first.requires_grad_(False)
        assert [name for name, _ in connection_groups(model)[0]["params"]] == ["2.weight"]


def test_many_are_counted() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)])
    for layer in model:
        parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match=r"0.weight, .* 4.weight and 4 more would stay dense"):
        connection_groups(model)
