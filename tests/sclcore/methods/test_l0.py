"""L0-ARM and L0-AR against the expectation over all settings, and against the textbook's form."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sclcore.driver.bernoulli import Curve, estimate, logit_slope, probability, slope, survivors
from sclcore.driver.build import optimizer_of
from sclcore.driver.gates import gated_layers
from sclcore.driver.optimizer import Driver
from sclcore.methods.l0 import L0
from tests.sclcore.driver.gated_net import GATES, Factors, GatedNet, gated_batches, gated_net
from tests.sclcore.methods.gated_training import gated_step, gated_training

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02}
EXAMPLE = torch.zeros(1, 2, 4, 4)


def l0(model: nn.Module, seed: int = 0, **options: Any) -> Driver:
    options = {"lam": 1.0, "gate_lr": 0.02, "keep": 0.7} | options
    optimizer = optimizer_of(L0(**options), model, EXAMPLE, SGD, seed)
    assert isinstance(optimizer, Driver)
    return optimizer


def losses_of_all_settings() -> tuple[list[tuple[float, ...]], Tensor]:
    """The loss of one batch for each setting of the 4 + 4 gates of the convolutions."""
    model, [(images, labels)] = gated_net(), gated_batches(1)
    # Losses that differ much beside their mean, which is what AR's noise comes of.
    model.head.weight.data *= 30
    settings = [*itertools.product((0.0, 1.0), repeat=8)]
    losses = []
    with torch.no_grad():
        for setting in settings:
            gates = dict(zip(GATES, torch.tensor(setting).double().view(2, 4), strict=False))
            with Factors(model, gates):
                losses.append(nn.functional.cross_entropy(model(images), labels))
    return settings, torch.stack(losses)


@pytest.mark.parametrize("curve", ["sigmoid", "hard"])
@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_both_estimators_are_unbiased(estimator: Any, curve: Curve) -> None:
    """The mean over a million draws against autograd of the exact expectation, Σ_z p(z) f(z)."""
    settings, losses = losses_of_all_settings()
    phi = torch.linspace(-0.25, 0.25, 8, dtype=torch.float64, requires_grad=True)
    pi = torch.sigmoid(7 * phi) if curve == "sigmoid" else (phi + 0.5).clamp(0, 1)
    torch.testing.assert_close(probability(phi, 7.0, curve), pi)
    z = torch.tensor(settings, dtype=torch.float64)
    chances = torch.where(z > 0, pi, 1 - pi).prod(1)
    [exact] = torch.autograd.grad((chances * losses).sum(), phi)

    phi, pi = phi.detach(), pi.detach()
    u = torch.rand(1_000_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = 2 ** torch.arange(7, -1, -1)
    found = [losses[((gates).long() * places).sum(1)][:, None] for gates in (u < pi, u > 1 - pi)]
    sample = estimate(found, u, estimator) * logit_slope(phi, 7.0, curve)
    error = sample.std(0) / math.sqrt(len(sample))
    # Five standard errors: of 32 comparisons one in 50,000 would fail. They are small beside what
    # is estimated, so that a wrong factor of the curve would show.
    assert ((sample.mean(0) - exact).abs() < 5 * error).all()
    assert (error < 0.25 * exact.abs().max()).all()


@pytest.mark.parametrize("curve", ["sigmoid", "hard"])
def test_the_slope_is_that_of_the_curve(curve: Curve) -> None:
    phi = torch.tensor([-2.0, -0.3, 0.1, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    [expected] = torch.autograd.grad(probability(phi, 7.0, curve).sum(), phi)
    torch.testing.assert_close(slope(phi.detach(), 7.0, curve).double(), expected)
    if curve == "hard":
        assert logit_slope(phi.detach(), 7.0, curve).tolist()[::4] == [0.0, 0.0]


class Textbook:
    """Gates as factors of outputs, their probabilities moved by torch's Adam."""

    def __init__(self, model: GatedNet, *, lam: dict[str, float], estimator: str) -> None:
        self.model, self.lam, self.estimator = model, lam, estimator
        start = math.log(0.7 / 0.3) / 7
        sizes = {name: model.get_parameter(name).shape[0] for name in GATES}
        self.phi = {
            name: torch.full((size,), start, dtype=torch.float64, requires_grad=True)
            for name, size in sizes.items()
        }
        self.adam = torch.optim.Adam(self.phi.values(), lr=0.004, fused=True)
        parameters = dict(model.named_parameters())
        vectors = [p for p in parameters.values() if p.ndim == 1]
        gated = [p for name, p in parameters.items() if name in GATES]
        groups: list[dict[str, Any]] = [{"params": vectors}, {"params": gated}]
        groups.append({"params": [model.head.weight], "weight_decay": SGD["weight_decay"]})
        self.sgd = torch.optim.SGD(groups, lr=SGD["lr"], momentum=SGD["momentum"])

    def step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        generator = torch.Generator().manual_seed(5 + 1_000_003 * number)
        every = torch.rand(13, generator=generator, dtype=torch.float64).split([4, 4, 5])
        u = dict(zip(GATES, every, strict=True))
        pi = {name: torch.sigmoid(7 * phi) for name, phi in self.phi.items()}
        self.sgd.zero_grad()
        self.adam.zero_grad()
        f = [
            self.loss(batch, {n: (u[n] < pi[n]).double() for n in GATES}),
            self.loss(batch, {n: (u[n] > 1 - pi[n]).double() for n in GATES}),
        ]
        total = sum(self.model.get_parameter(name).numel() for name in GATES)
        penalty = torch.zeros(())
        for name in GATES:
            rows = self.model.get_parameter(name).flatten(1)
            cost = self.lam[name] * rows.shape[1] / total
            penalty = penalty + (pi[name] * cost).sum()
            penalty = penalty + SGD["weight_decay"] / 2 * (pi[name] * rows.square().sum(1)).sum()
        # The loss trains weights in the first pass alone; the penalty trains both.
        (f[0] + penalty).backward()
        for name, phi in self.phi.items():
            by_draws = 7 * float(f[1].detach() - f[0].detach()) * (u[name] - 0.5)
            if self.estimator == "ar":
                by_draws = 7 * float(f[0].detach()) * (1 - 2 * u[name])
            assert phi.grad is not None
            phi.grad += by_draws
        self.sgd.step()
        self.adam.step()

    def loss(self, batch: tuple[Tensor, Tensor], gates: dict[str, Tensor]) -> Tensor:
        with Factors(self.model, gates):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])


@pytest.mark.parametrize("estimator", ["arm", "ar"])
def test_it_is_the_textbooks(estimator: Any) -> None:
    """Twenty updates: weights, batch norm, biases and probabilities, with λ of each layer."""
    prices = {"conv.weight": 0.5, "deep.weight": 2.0, "hidden.weight": 0.5}
    model, batches = gated_net(), gated_batches(20)
    book = Textbook(gated_net(), lam=prices, estimator=estimator)
    optimizer = l0(model, 5, lam={"*": 0.5, "deep": 2.0}, estimator=estimator, gate_lr=0.004)
    gated_training(model, optimizer, batches)
    for number, batch in enumerate(batches):
        book.step(batch, number)
    phis = {layer.name: layer.state["phi"] for layer in gated_layers(optimizer)}
    latent = {each.name: each for each in [*optimizer.tensors, *optimizer.others]}
    for name, phi in book.phi.items():
        # In double, with the same sums in another order.
        torch.testing.assert_close(phis[name], phi.detach(), rtol=0, atol=1e-9)
        assert not torch.allclose(phi, phi[0].expand_as(phi))
    for name, expected in book.model.named_parameters():
        found = latent[name].state.get("weight", latent[name].param)
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=1e-9, msg=name)


def test_survivors_are_scaled_or_whole() -> None:
    pi = {"a": torch.tensor([0.2, 0.5, 0.9]), "b": torch.tensor([0.1, 0.3, 0.2])}
    scaled = survivors(pi, scaled=True)
    torch.testing.assert_close(scaled["a"], torch.tensor([0.0, 0.5, 0.9]))
    assert not scaled["b"].any()
    whole = survivors(pi, scaled=False)
    assert [whole["a"].tolist(), whole["b"].tolist()] == [[0, 1, 1], [0, 0, 0]]


def test_between_updates_the_network_is_the_evaluated_one() -> None:
    """Its zeros are what masks call dead; with a high λ they come to be, and layers are held."""
    model, batches = gated_net(dtype=torch.float32), gated_batches(60, torch.float32)
    optimizer = l0(model, lam=40.0, gate_lr=0.05)
    held = set()

    def check(step: int) -> None:
        held.update(optimizer.held_layers)
        masks = optimizer.masks()
        for name, mask in masks.items():
            assert torch.equal(model.get_parameter(name) != 0, mask), (step, name)
        shut = ~masks["conv.weight"].flatten(1).any(1)
        assert not model.norm.weight[shut].any() and not model.norm.bias[shut].any()

    gated_training(model, optimizer, batches, each=check)
    live = optimizer.live_connections()
    assert live["conv.weight"] == 18, "the likeliest of its 4 features"
    assert held == {*GATES}
    pi = optimizer.method.shown(optimizer)["conv.weight"]  # type: ignore[attr-defined]
    assert pi.max() == pytest.approx(1 / (1 + math.exp(-0.07)))


def test_without_a_price_and_with_ever_likelier_gates_nothing_dies() -> None:
    model, batches = gated_net(dtype=torch.float32), gated_batches(10, torch.float32)
    optimizer = l0(model, lam=0.0, keep=0.95)
    gated_training(model, optimizer, batches)
    assert optimizer.live_connections() == optimizer.connection_sizes()


def test_what_is_saved_goes_on_bit_for_bit() -> None:
    batches = gated_batches(30, torch.float32)
    whole, first, other = (gated_net(seed, torch.float32) for seed in (0, 0, 1))
    optimizer, interrupted, resumed = l0(whole), l0(first), l0(other)
    gated_training(whole, optimizer, batches)
    gated_training(first, interrupted, batches, range(13))
    other.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(interrupted.state_dict()))
    for (name, p), q in zip(first.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    gated_training(other, resumed, batches, range(13, 30))
    for (name, p), q in zip(whole.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert optimizer.mask_hash() == resumed.mask_hash()


def test_a_gradient_that_is_not_finite_leaves_the_evaluated_network() -> None:
    model, batches = gated_net(dtype=torch.float32), gated_batches(8, torch.float32)
    optimizer = l0(model)
    gated_training(model, optimizer, batches, range(7))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images, labels = batches[7]
    gated_step(model, optimizer, (images * math.inf, labels))
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_loop_that_does_not_draw_is_told_so() -> None:
    model, [(images, labels)] = gated_net(), gated_batches(1)
    optimizer = l0(model)
    nn.functional.cross_entropy(model(images), labels).backward()
    with pytest.raises(RuntimeError, match=r"l0 needs to know of losses: call before_update"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": -1.0}, "lam"),
        ({"keep": 1.0}, "keep"),
        ({"k": 0.0}, "k\n.*greater than 0"),
        ({"estimator": "reinforce"}, "'arm' or 'ar'"),
        ({"lam": {"conv": 1.0}}, "lam has no value for the layer deep"),
        ({"keep": {"*": 0.5, "head": 0.2}}, "keep pattern 'head' matches no layer with gates"),
        ({"exclude": ["conv", "deep", "hidden"]}, "no units to gate"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        l0(gated_net(), **options)


def test_a_second_forward_pass_costs_a_third() -> None:
    assert L0(lam=1.0).update_cost == pytest.approx(4 / 3)
    assert L0(lam=1.0, estimator="ar").update_cost == 1.0
