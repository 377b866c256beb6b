"""SCL behaves as users of torch.optim expect, and keeps its promises about masks."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore import SCL, connection_groups
from sclcore.kernels.proxies import unit_step
from sclcore.scl.settings import NORMALIZATIONS
from tests.sclcore.nets import Mixed, Mlp, mixed_batches, mlp, mlp_batches, mse_step, train

# Strong enough that within 40 steps of the MLP (192 connections) about half of them have died.
STRONG: dict[str, Any] = {"lr": 0.05, "lam": 0.3, "mask_lr": 0.02, "weight_decay": 1e-3}


def _scl(model: nn.Module, **options: Any) -> SCL:
    return SCL(connection_groups(model), **{**STRONG, **options})


def _trained(steps: int = 40, **options: Any) -> tuple[Mlp, SCL]:
    model = mlp()
    optimizer = _scl(model, **options)
    train(model, optimizer, mlp_batches(steps))
    return model, optimizer


def _density(optimizer: SCL) -> float:
    masks = optimizer.masks().values()
    return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def _same_state(a: SCL, b: SCL) -> None:
    """Bit for bit."""
    one, two = a.state_dict()["state"], b.state_dict()["state"]
    assert one.keys() == two.keys()
    for index, state in one.items():
        assert state.keys() == two[index].keys()
        for key, value in state.items():
            assert value.dtype == two[index][key].dtype
            assert torch.equal(value, two[index][key]), f"{key} of parameter {index}"


def _same_parameters(a: nn.Module, b: nn.Module) -> None:
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(p, q), name


# --- the interface of torch.optim -----------------------------------------------------------------


def test_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    model, batch = mlp(), mlp_batches(1)[0]
    optimizer = _scl(model)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        loss.backward()
        calls.append(loss)
        return loss

    before = copy.deepcopy(model)
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(calls) == 1 and loss is calls[0]
    other = _scl(before)
    mse_step(before, other, batch)
    _same_parameters(model, before)
    assert optimizer.step() is None


def test_zero_grad() -> None:
    model, optimizer = _trained(1)
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_step_leaves_gradients_alone() -> None:
    """They may be logged, clipped or accumulated further by whoever owns the loop."""
    model, optimizer = _trained(5)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is not None and torch.equal(p.grad, grad)


def _continued(model: nn.Module, optimizer: SCL, saved: dict[str, Any], weights: Any) -> None:
    """Training on equals training a fresh pair on that was given the saved state."""
    fresh = mlp(seed=5)
    fresh.load_state_dict(weights)
    resumed = SCL(connection_groups(fresh), lr=9.0, lam=9.0)  # the saved options must win
    resumed.load_state_dict(saved)
    _same_parameters(model, fresh)
    more = mlp_batches(30)[10:]
    train(model, optimizer, more)
    train(fresh, resumed, more)
    _same_parameters(model, fresh)
    _same_state(optimizer, resumed)
    assert optimizer.mask_hash() == resumed.mask_hash()


def test_state_dict_continues_bit_for_bit() -> None:
    model, optimizer = _trained(nesterov=True, proxy="softplus")
    assert 0.1 < _density(optimizer) < 0.9
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    _continued(model, optimizer, saved, weights)


def test_state_dict_survives_torch_save() -> None:
    model, optimizer = _trained()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    _continued(model, optimizer, loaded["optimizer"], loaded["model"])


def test_a_loaded_optimizer_shares_no_memory_with_the_saved_state() -> None:
    _, optimizer = _trained()
    saved = optimizer.state_dict()
    frozen = copy.deepcopy(saved)
    fresh = mlp()
    resumed = _scl(fresh)
    resumed.load_state_dict(saved)
    train(fresh, resumed, mlp_batches(3))
    for index, state in saved["state"].items():
        for key, value in state.items():
            assert torch.equal(value, frozen["state"][index][key])


def test_loading_sets_the_parameters_to_the_effective_weights() -> None:
    model, optimizer = _trained()
    fresh = mlp(seed=5)  # other weights, and dense
    resumed = _scl(fresh)
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(fresh.first.weight, model.first.weight)
    assert torch.equal(fresh.second.weight, model.second.weight)


def test_loading_for_another_model_is_refused() -> None:
    _, optimizer = _trained(1)
    with pytest.raises(ValueError, match="doesn't match"):
        _scl(nn.Sequential(nn.Linear(8, 4))).load_state_dict(optimizer.state_dict())


def test_bf16_parameters_keep_float32_latent_state_through_save_and_load() -> None:
    model = mlp().bfloat16()
    optimizer = _scl(model)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in mlp_batches(40)]
    train(model, optimizer, batches)
    fresh = mlp(seed=5).bfloat16()
    resumed = _scl(fresh)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in (fresh.first.weight, fresh.second.weight):
        for key in ("weight", "mask", "momentum_buffer", "mask_momentum_buffer"):
            assert resumed.state[p][key].dtype == torch.float32, key
    assert 0.1 < _density(optimizer) < 0.9
    _same_state(optimizer, resumed)
    fresh.load_state_dict(model.state_dict())
    train(model, optimizer, batches[:10])
    train(fresh, resumed, batches[:10])
    _same_parameters(model, fresh)
    _same_state(optimizer, resumed)


def test_bf16_latent_weights_accumulate_what_bf16_would_lose() -> None:
    """A thousand updates of a 1000th of a bf16 step each must add up."""
    layer = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    optimizer = SCL(connection_groups(layer), lr=1e-5, lam=0.0, mask_lr=0.0, momentum=0.0)
    for _ in range(1000):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    # 1 − 1000 · 1e-5 = 0.99; bf16 has steps of 2^-8 = 0.004 below 1.
    assert layer.weight[0, 0].item() == pytest.approx(0.99, abs=0.002)
    assert optimizer.state[layer.weight]["weight"][0, 0].item() == pytest.approx(0.99, abs=1e-4)


def test_add_param_group() -> None:
    model, optimizer = _trained(10)
    extra = nn.Linear(4, 4)
    optimizer.add_param_group(
        {"params": [("e.w", extra.weight)], "connections": True, "lam": 1.0, "mask_lr": 0.1}
    )
    optimizer.add_param_group({"params": [("e.b", extra.bias)]})
    start = extra.bias.detach().clone()
    train(nn.Sequential(model, extra), optimizer, mlp_batches(20))
    assert not torch.equal(extra.bias, start)
    assert list(optimizer.masks()) == ["0.weight", "2.weight", "e.w"]
    mask = optimizer.masks()["e.w"]
    # λ = 1 with steps of 0.1 against m = 1: some of the 16 have died.
    assert 1 <= int(mask.sum()) < 16
    assert torch.equal(extra.weight != 0, mask)


def test_groups_without_names_get_numbers() -> None:
    """As any torch optimizer takes them: tensors alone, in several groups."""
    model = mlp()
    groups: list[dict[str, Any]] = [
        {"params": [model.first.weight], "connections": True},
        {"params": [model.first.bias, model.second.bias]},
        {"params": [model.second.weight], "connections": True, "lam": 0.1},
    ]
    optimizer = SCL(groups, **STRONG)
    train(model, optimizer, mlp_batches(40))
    assert list(optimizer.masks()) == ["param0", "param3"]
    assert 0.1 < _density(optimizer) < 0.9


def test_a_refused_group_is_not_added() -> None:
    _, optimizer = _trained(1)
    before = len(optimizer.param_groups)
    extra = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="lam"):
        optimizer.add_param_group({"params": [("extra", extra)], "lam": -1.0})
    assert len(optimizer.param_groups) == before


@pytest.mark.parametrize("kind", ["cosine", "onecycle"])
def test_torch_schedulers_drive_lr(kind: str) -> None:
    model = mlp()
    optimizer = _scl(model, mask_lr=0.0, lam=0.0, lr=0.1)
    if kind == "cosine":
        scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    else:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    rates, moved = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" and kin
        for batch in mlp_batches(19):
            rates.append(optimizer.param_groups[0]["lr"])
            before = model.first.weight.detach().clone()
            mse_step(model, optimizer, batch)
            buffer = optimizer.state[model.first.weight]["momentum_buffer"]
            step = before - model.first.weight.detach()
            # What was subtracted is lr times the momentum buffer, whatever lr is at the time.
            assert torch.allclose(step, rates[-1] * buffer, rtol=1e-4, atol=1e-7)
            moved.append(float(step.abs().max()))
            scheduler.step()
    assert max(rates) == pytest.approx(0.1, rel=1e-6) and min(rates) < 0.01
    assert all(m > 0 for m in moved)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_continue_alike(how: str) -> None:
    pair = _trained()
    model, optimizer = pair
    optimizer.skipped_steps = 3
    twin_model, twin = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    train(model, optimizer, mlp_batches(10))
    train(twin_model, twin, mlp_batches(10))
    _same_parameters(model, twin_model)
    _same_state(optimizer, twin)
    assert optimizer.mask_hash() == twin.mask_hash()


def test_a_copy_keeps_its_counts() -> None:
    _, optimizer = _trained(2)
    optimizer.skipped_steps = 3
    assert copy.deepcopy(optimizer).skipped_steps == 3


def test_plain_parameters_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"connection_groups\(model\)"):
        SCL(mlp().parameters(), lr=0.1, lam=0.1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -0.1),
        ("lr", math.nan),
        ("lam", -1e-9),
        ("lam", math.inf),
        ("mask_lr", -1.0),
        ("mask_lr", math.nan),
        ("weight_decay", -1e-4),
        ("min_connections", -1),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("mask_momentum", 1.0),
        ("mask_momentum", math.nan),
        ("mask_init", 0.0),
        ("mask_init", -1.0),
        ("mask_init", math.inf),
        ("normalize", "filter"),
        ("proxy", "sigmoid"),
    ],
)
def test_an_invalid_option_is_named(option: str, value: Any) -> None:
    options = {"lr": 0.1, "lam": 0.1, option: value}
    with pytest.raises(ValueError, match=rf"\b{option}\b.*{value}"):
        SCL(connection_groups(mlp()), **options)
    # The same where it comes with a group.
    with pytest.raises(ValueError, match=rf"\b{option}\b"):
        SCL(connection_groups(mlp(), **{option: value}), lr=0.1, lam=0.1)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        SCL(connection_groups(mlp()), lr=0.1, lam=0.1, nesterov=True, momentum=0.0)


@pytest.mark.parametrize("key", ["costs", "transposed_groups"])
def test_lists_of_a_group_must_fit_its_parameters(key: str) -> None:
    groups = connection_groups(mlp())
    groups[0][key] = [1]
    with pytest.raises(ValueError, match=f"{key} must have one entry per parameter"):
        SCL(groups, lr=0.1, lam=0.1)


# --- w, m and v -----------------------------------------------------------------------------------


def test_parameters_are_w_where_live_and_exactly_zero_elsewhere_after_each_step() -> None:
    model = mlp()
    optimizer = _scl(model)
    seen_dead = 0

    def check(_: int) -> None:
        nonlocal seen_dead
        masks = optimizer.masks()
        for name in ("0.weight", "2.weight"):
            p = model.get_parameter(name)
            state = optimizer.state[p]
            assert torch.equal(masks[name], unit_step(state["mask"]))
            assert torch.equal(p[masks[name]], state["weight"][masks[name]])
            assert (p[~masks[name]] == 0).all()
            seen_dead += int((~masks[name]).sum())

    train(model, optimizer, mlp_batches(60), check)
    assert seen_dead > 1000


def test_momentum_and_weight_decay_never_move_a_pruned_weight() -> None:
    model, optimizer = _trained(momentum=0.99, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["mask_lr"] = 0.0
    pruned = {n: ~m for n, m in optimizer.masks().items()}
    latent = {n: optimizer.state[model.get_parameter(n)]["weight"].clone() for n in pruned}
    assert sum(int(m.sum()) for m in pruned.values()) > 50

    def check(_: int) -> None:
        for name, dead in pruned.items():
            assert (model.get_parameter(name)[dead] == 0).all()

    train(model, optimizer, mlp_batches(40), check)
    # While their latent weights did move, by momentum and decay, as the method says.
    for name, dead in pruned.items():
        now = optimizer.state[model.get_parameter(name)]["weight"]
        assert not torch.equal(now[dead], latent[name][dead])


def test_a_revived_connection_gets_its_latent_weight_back() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.25]]))
    optimizer = SCL(
        connection_groups(layer),
        lr=0.0,
        lam=0.0,
        mask_lr=1.0,
        mask_momentum=0.0,
        mask_init=0.5,
        min_connections=0,
    )
    # ∂L/∂m = G·w: +1 kills (normalised over the feature both have rms 1), −1 revives.
    layer.weight.grad = torch.tensor([[2.0, -4.0]])
    optimizer.step()
    assert layer.weight.tolist() == [[0.0, 0.0]]
    layer.weight.grad = torch.tensor([[-2.0, 4.0]])
    optimizer.step()
    assert layer.weight.tolist() == [[0.5, -0.25]]


@pytest.mark.parametrize("nesterov", [False, True])
def test_dense_groups_are_exactly_sgd(nesterov: bool) -> None:
    """Biases, norms and excluded layers follow torch.optim.SGD, given the same gradients."""
    model = mlp()
    optimizer = SCL(connection_groups(model, exclude=["2"]), nesterov=nesterov, **STRONG)
    copies = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    dense = {n: copies[n] for n in ("0.bias", "2.weight", "2.bias")}
    decayed = [dense["2.weight"]]
    sgd = torch.optim.SGD(
        [
            {"params": decayed},
            {"params": [dense["0.bias"], dense["2.bias"]], "weight_decay": 0.0},
        ],
        lr=STRONG["lr"],
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=STRONG["weight_decay"],
    )
    for batch in mlp_batches(30):
        mse_step(model, optimizer, batch)
        for name, p in dense.items():
            grad = model.get_parameter(name).grad
            assert grad is not None
            p.grad = grad.clone()
        sgd.step()
        for name, p in dense.items():
            assert torch.equal(p, model.get_parameter(name)), name
    assert _density(optimizer) < 1, "while the masks of the other layer were being learned"


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True, "weight_decay": 0.01}, {"momentum": 0.0}],
    ids=["momentum", "nesterov-decay", "plain"],
)
def test_without_masks_scl_is_exactly_sgd(options: dict[str, Any]) -> None:
    model = Mixed()
    twin = copy.deepcopy(model)
    full = {"lr": 0.05, "momentum": 0.9, **options}
    optimizer = SCL(connection_groups(model), lam=0.0, mask_lr=0.0, **full)
    groups = connection_groups(twin)
    sgd = torch.optim.SGD(
        [{k: v for k, v in g.items() if k in ("params", "weight_decay")} for g in groups], **full
    )
    for batch in mixed_batches(torch.float32):
        mse_step(model, optimizer, batch)
        mse_step(twin, sgd, batch)
        _same_parameters(model, twin)


def test_mask_lr_zero_freezes_masks_exactly() -> None:
    model, optimizer = _trained()
    mask = {n: m.clone() for n, m in optimizer.mask_variables().items()}
    digest = optimizer.mask_hash()
    weights = model.first.weight.detach().clone()
    for group in optimizer.param_groups:
        group["mask_lr"] = 0.0
    train(model, optimizer, mlp_batches(20))
    for name, m in optimizer.mask_variables().items():
        assert torch.equal(m, mask[name]), "in spite of λ and of momentum"
    assert optimizer.mask_hash() == digest
    assert not torch.equal(model.first.weight, weights), "the weights go on learning"


def test_mask_hash_tells_masks_apart_and_nothing_else() -> None:
    model, optimizer = _trained()
    twin = copy.deepcopy((model, optimizer))[1]
    assert twin.mask_hash() == optimizer.mask_hash()
    variables = next(iter(twin.mask_variables().values()))
    variables.mul_(2)
    assert twin.mask_hash() == optimizer.mask_hash(), "the same network"
    variables[3, 2] *= -1
    assert twin.mask_hash() != optimizer.mask_hash(), "one connection differs"
    other, fresh = _scl(mlp()), _scl(mlp(seed=1))
    assert other.mask_hash() == fresh.mask_hash() != optimizer.mask_hash()


def test_live_connections_are_those_of_the_masks() -> None:
    model, optimizer = _trained()
    counts = {name: int(mask.sum()) for name, mask in optimizer.masks().items()}
    assert optimizer.live_connections() == counts
    optimizer.mask_variables()["0.weight"].fill_(-1.0)
    optimizer.mask_variables()["0.weight"][0, 0] = 1.0
    assert optimizer.live_connections() == {**counts, "0.weight": 1}
    optimizer.write_weights()
    assert int((model.first.weight != 0).sum()) == 1
    fresh = _scl(mlp())
    assert fresh.live_connections() == {"0.weight": 128, "2.weight": 64}


def test_groups_may_be_stepped_one_by_one() -> None:
    """As DeepSpeed does: others neither hide what was held, nor step where the first did not."""
    model = mlp()
    optimizer = SCL(connection_groups(model), lr=0.05, lam=50.0, mask_lr=0.1)
    groups = optimizer.param_groups
    observed = []
    for index, batch in enumerate(mlp_batches(10)):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        grad, before = model.first.weight.grad, model.first.bias.detach().clone()
        assert grad is not None
        if index == 8:
            grad[0, 0] = math.nan
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
        observed.append((list(optimizer.held_layers), torch.equal(model.first.bias, before)))
    assert observed[7] == (["0.weight", "2.weight"], False)
    assert observed[8] == ([], True), "biases stay where masks do"
    assert observed[9] == (["0.weight", "2.weight"], False)
    assert optimizer.skipped_steps == 1


# --- the guards -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["0.weight", "2.bias"])
def test_a_non_finite_gradient_changes_nothing_and_is_counted(bad: float, where: str) -> None:
    model, optimizer = _trained(5)
    before = copy.deepcopy((model, optimizer))
    grad = model.get_parameter(where).grad
    assert grad is not None
    grad.view(-1)[0] = bad
    optimizer.step()
    optimizer.step()
    assert optimizer.skipped_steps == 2
    assert not math.isfinite(optimizer.grad_norm)
    _same_parameters(model, before[0])
    _same_state(optimizer, before[1])
    mse_step(model, optimizer, mlp_batches(1)[0])
    assert optimizer.skipped_steps == 2 and math.isfinite(optimizer.grad_norm)
    assert not torch.equal(model.first.weight, before[0].first.weight)


def test_grad_norm_is_that_of_all_parameters() -> None:
    model, optimizer = _trained(3)
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())  # type: ignore
    assert optimizer.grad_norm == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_min_connections_keeps_the_best_scored_and_says_so() -> None:
    model = mlp()
    optimizer = SCL(connection_groups(model), lr=0.05, lam=5.0, mask_lr=0.05, min_connections=3)
    held_at = []

    def check(index: int) -> None:
        masks = optimizer.masks()
        counts = {n: int(m.sum()) for n, m in masks.items()}
        assert all(c >= 3 for c in counts.values())
        for name in optimizer.held_layers:
            assert counts[name] == 3
            m = optimizer.mask_variables()[name]
            # The others score no better than what these had before they were held at just above 0.
            assert float(m[masks[name]].min()) > 0 >= float(m[~masks[name]].max())
            p = model.get_parameter(name)
            assert torch.equal(p != 0, masks[name])
        held_at.append(list(optimizer.held_layers))

    train(model, optimizer, mlp_batches(60), check)
    assert held_at[0] == [], "not before it has to act"
    assert set(held_at[-1]) == {"0.weight", "2.weight"}


def test_min_connections_chooses_by_score() -> None:
    layer = nn.Linear(4, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = SCL(
        connection_groups(layer),
        lr=0.0,
        lam=3.0,
        mask_lr=1.0,
        mask_momentum=0.0,
        normalize="none",
        min_connections=2,
    )
    # m ← 1 − (G·w + 3): −2 − G. All negative; the best are those with the lowest G.
    layer.weight.grad = torch.tensor([[0.5, -0.5, 1.0, 0.0]])
    optimizer.step()
    assert optimizer.masks()["weight"].tolist() == [[False, True, False, True]]
    assert optimizer.held_layers == ["weight"]
    layer.weight.grad = torch.tensor([[-9.0, -9.0, -9.0, -9.0]])
    optimizer.step()
    assert optimizer.held_layers == [] and bool(optimizer.masks()["weight"].all())


def test_min_connections_keeps_the_first_of_equals() -> None:
    """So that ranks with parts of the layer, however it is cut, keep the same."""
    layer = nn.Linear(16, 8, bias=False)
    optimizer = SCL(connection_groups(layer), lr=0.0, lam=9.0, mask_lr=1.0, min_connections=40)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert optimizer.masks()["weight"].flatten().tolist() == [i < 40 for i in range(128)]


def test_min_connections_above_the_size_of_a_layer_keeps_all_of_it() -> None:
    layer = nn.Linear(3, 1, bias=False)
    optimizer = SCL(connection_groups(layer), lr=0.0, lam=9.0, mask_lr=1.0, min_connections=100)
    layer.weight.grad = torch.ones(1, 3)
    optimizer.step()
    assert bool(optimizer.masks()["weight"].all())


def test_without_the_guard_a_layer_can_die() -> None:
    model = mlp()
    optimizer = SCL(connection_groups(model), lr=0.05, lam=5.0, mask_lr=0.05, min_connections=0)
    train(model, optimizer, mlp_batches(60))
    assert not any(bool(m.any()) for m in optimizer.masks().values())
    assert optimizer.held_layers == []


def test_parameters_without_a_gradient_are_skipped() -> None:
    model, optimizer = _trained(5)
    before = copy.deepcopy((model, optimizer))
    optimizer.zero_grad()
    x, y = mlp_batches(1)[0]
    model.first.weight.requires_grad_(False)
    model.first.bias.requires_grad_(False)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    assert torch.equal(model.first.weight, before[0].first.weight)
    assert torch.equal(model.first.bias, before[0].first.bias)
    state, old = optimizer.state[model.first.weight], before[1].state[before[0].first.weight]
    assert all(torch.equal(state[k], old[k]) for k in old)
    assert not torch.equal(model.second.weight, before[0].second.weight)


def test_a_step_without_any_gradient_does_nothing() -> None:
    model = mlp()
    before = copy.deepcopy(model)
    optimizer = _scl(model)
    optimizer.step()
    _same_parameters(model, before)
    assert optimizer.skipped_steps == 0 and optimizer.mask_variables() == {}
    assert all(bool(m.all()) for m in optimizer.masks().values())


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 8, sparse=True)
    model = nn.Sequential(embedding, nn.Linear(8, 2))
    optimizer = _scl(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


# --- layouts and precisions -----------------------------------------------------------------------


def test_channels_last_gives_the_same_network() -> None:
    """To rounding: the kernels of another layout may add in another order."""
    plain = Mixed().double()
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not other.conv.weight.is_contiguous()
    pair = [(m, _scl(m, mask_lr=0.02, normalize="feature")) for m in (plain, other)]
    for x, y in mixed_batches(torch.float64) * 4:
        mse_step(*pair[0], (x, y))
        mse_step(*pair[1], (x.to(memory_format=torch.channels_last), y))
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert pair[0][1].mask_hash() == pair[1][1].mask_hash()
    assert 0.1 < _density(pair[0][1]) < 0.9
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        # float64 over 40 steps; the oracle test's argument.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=name)


def test_autocast_bf16() -> None:
    model = mlp()
    optimizer = _scl(model, normalize="feature")
    losses = []
    for x, y in mlp_batches(60):
        optimizer.zero_grad()
        with torch.amp.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
            assert output.dtype == torch.bfloat16
            loss = nn.functional.mse_loss(output.float(), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), "it learns"
    assert 0.1 < _density(optimizer) < 0.9
    for name, mask in optimizer.masks().items():
        p = model.get_parameter(name)
        assert p.dtype == torch.float32 and torch.equal(p != 0, mask)


def test_bf16_parameters() -> None:
    model = mlp().bfloat16()
    optimizer = _scl(model)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in mlp_batches(60)]
    losses = train(model, optimizer, batches)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), "it learns"
    for name, mask in optimizer.masks().items():
        p = model.get_parameter(name)
        state = optimizer.state[p]
        assert p.dtype == torch.bfloat16
        assert {state[k].dtype for k in state} == {torch.float32}
        assert torch.equal(p, (state["weight"] * mask).bfloat16())
        assert not bool(mask.all())


def test_observing_reports_flips_and_the_two_rms() -> None:
    model, optimizer = _trained(20, normalize="feature")
    assert optimizer.observations == {}, "costs nothing unless asked for"
    optimizer.observing = True
    for batch in mlp_batches(10):
        before = optimizer.masks()
        mse_step(model, optimizer, batch)
        after = optimizer.masks()
        for name, seen in optimizer.observations.items():
            assert seen.flips == int((before[name] != after[name]).sum())
            assert seen.rms_before.shape == (model.get_parameter(name).shape[0],)
            # After normalisation per feature every feature has rms 1, or 0 where nothing arrived.
            alive = seen.rms_before > 0
            assert torch.allclose(seen.rms_after[alive], torch.ones(int(alive.sum())), atol=1e-5)
    assert set(optimizer.observations) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_observed_rms_are_those_of_the_mask_gradient(normalize: str) -> None:
    model, optimizer = _trained(5, normalize=normalize)
    optimizer.observing = True
    p = model.first.weight
    latent = optimizer.state[p]["weight"].clone()
    latent_last = optimizer.state[model.second.weight]["weight"].clone()
    mse_step(model, optimizer, mlp_batches(1)[0])
    assert p.grad is not None
    expected = (p.grad * latent).square().mean(1).sqrt()
    assert model.second.weight.grad is not None
    other = (model.second.weight.grad * latent_last).square()
    per_feature = 192 / (16 + 4)  # mask variables, on average
    after = {
        "feature": expected / expected,
        "feature_norm": torch.full_like(expected, (per_feature / 8) ** 0.5),
        "layer": expected / expected.square().mean().sqrt(),
        "network": expected / ((expected.square().sum() * 8 + other.sum()) / 192).sqrt(),
        "none": expected,
    }[normalize]
    seen = optimizer.observations["0.weight"]
    torch.testing.assert_close(seen.rms_before, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.rms_after, after, rtol=1e-5, atol=0)
