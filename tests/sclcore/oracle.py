"""The textbook form of SCL, written without a line of sclcore: the reference it must agree with.

Explicit leaves w and m per layer, an autograd function for H(m) whose backward is the proxy's,
the network evaluated at v = w ⊙ H(m) through `functional_call`; loops instead of views. Slow and
plain on purpose. Source: Tang et al., arXiv 2201.05020, and DESIGN.md §1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-12


def slope(proxy: str, m: Tensor) -> Tensor:
    """φ'(m) as the definitions give it."""
    one, zero = torch.ones_like(m), torch.zeros_like(m)
    if proxy == "identity":
        return one
    if proxy == "leaky_relu":
        return torch.where(m > 0, one, 0.1 * one)
    if proxy == "softplus":
        return 1 / (1 + torch.exp(-m))
    if proxy == "relu":
        return torch.where(m > 0, one, zero)
    if proxy == "clipped":
        return torch.where(m > 0, torch.where(m <= 1, one, zero), zero)
    raise AssertionError(proxy)


class _UnitStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, m: Tensor, proxy: str, allowed: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        ctx.proxy = proxy
        return torch.where(m > 0, torch.ones_like(m), torch.zeros_like(m)) * allowed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (m,) = ctx.saved_tensors
        return grads[0] * slope(ctx.proxy, m), None, None


def unit_step(m: Tensor, proxy: str, allowed: Tensor | None = None) -> Tensor:
    """H(m), 0 where it is not `allowed`; its derivative is the proxy's everywhere."""
    every = torch.ones_like(m) if allowed is None else allowed.to(m.dtype)
    return _UnitStep.apply(m, proxy, every)  # type: ignore[return-value]


def best_of_blocks(m: Tensor, n_m: tuple[int, int]) -> Tensor:
    """Where m is among the best n of m neighbours in the flattened fan-in."""
    n, size = n_m
    allowed = torch.zeros_like(m, dtype=torch.bool)
    for row, chosen in zip(m.detach().flatten(1), allowed.view(len(m), -1), strict=True):
        for first in range(0, len(row), size):
            block = row[first : first + size].tolist()
            for place in sorted(range(size), key=lambda i, b=block: -b[i])[:n]:
                chosen[first + place] = True
    return allowed


def coarse_shape(shape: tuple[int, ...], granularity: str) -> tuple[int, ...]:
    """The shape of the mask variables of a weight."""
    return shape[: {"weight": len(shape), "kernel": 2, "feature": 1}[granularity]]


def features(module: nn.Module, attribute: str) -> list[tuple[Any, ...]]:
    """The index of each output feature of a weight, one by one."""
    weight = getattr(module, attribute)
    if isinstance(module, nn.ConvTranspose2d):
        inputs = module.in_channels // module.groups
        outputs = module.out_channels // module.groups
        return [
            (slice(g * inputs, (g + 1) * inputs), o)
            for g in range(module.groups)
            for o in range(outputs)
        ]
    return [(o,) for o in range(weight.shape[0])]


def connections_of(model: nn.Module) -> dict[str, list[tuple[Any, ...]]]:
    """Name → indices of the features, of each tensor of connections."""
    found = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            found[f"{dot}weight"] = features(module, "weight")
        if isinstance(module, nn.MultiheadAttention):
            found[f"{dot}in_proj_weight"] = features(module, "in_proj_weight")
    return found


class Textbook:
    """SCL with SGD or AdamW, from ∂L/∂w and ∂L/∂m as autograd gives them for explicit w and m."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        lam: float,
        mask_lr: float,
        momentum: float,
        mask_momentum: float,
        mask_restart: float = 0.0,
        mask_gradient: str = "full",
        weight_decay: float,
        nesterov: bool,
        proxy: str,
        normalize: str,
        costs: Mapping[str, float],
        mask_init: float = 1.0,
        granularity: Mapping[str, str] | None = None,
        n_m: Mapping[str, tuple[int, int]] | None = None,
        weight_rule: str = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.lr, self.lam, self.mask_lr = lr, lam, mask_lr
        self.mask_restart, self.mask_gradient = mask_restart, mask_gradient
        self.momentum, self.mask_momentum = momentum, mask_momentum
        self.weight_decay, self.nesterov = weight_decay, nesterov
        self.proxy, self.normalize, self.costs = proxy, normalize, costs
        self.features = connections_of(model)
        self.granularity, self.n_m = dict(granularity or {}), dict(n_m or {})
        self.w: dict[str, Tensor] = {}
        self.m: dict[str, Tensor] = {}
        self.dense: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            leaf = p.detach().clone().requires_grad_()
            if name in self.features:
                self.w[name] = leaf
                kind = self.granularity.get(name, "weight")
                m = leaf.new_full(coarse_shape(tuple(leaf.shape), kind), mask_init)
                if name in self.n_m:
                    m += leaf.detach().abs()
                self.m[name] = m.detach().requires_grad_()
            else:
                self.dense[name] = leaf
        self.velocity = {n: torch.zeros_like(t) for n, t in {**self.w, **self.dense}.items()}
        self.adamw = weight_rule == "adamw"
        self.betas, self.eps, self.time = betas, eps, 0
        self.squares = {n: torch.zeros_like(t) for n, t in self.velocity.items()}
        self.mask_velocity = {n: torch.zeros_like(t) for n, t in self.m.items()}

    def effective(self) -> dict[str, Tensor]:
        """All parameters of the network as it computes: v for connections, the rest as they are."""
        v = {n: self.w[n] * self.spread(n, self.steps(n)) for n in self.w}
        return {**v, **self.dense}

    def steps(self, name: str) -> Tensor:
        """H(m) of each mask variable."""
        m = self.m[name]
        allowed = best_of_blocks(m, self.n_m[name]) if name in self.n_m else None
        return unit_step(m, self.proxy, allowed)

    def spread(self, name: str, values: Tensor) -> Tensor:
        """One number per mask variable → one per weight."""
        shape = self.w[name].shape
        return values.reshape(*values.shape, *[1] * (len(shape) - values.ndim)).expand(shape)

    def step(self, loss_of: Callable[[Callable[..., Tensor]], Tensor]) -> float:
        """`loss_of(forward)` evaluates the loss; `forward` is the network at the present w, m."""
        parameters = self.effective()
        loss = loss_of(lambda *x: torch.func.functional_call(self.model, parameters, x))
        leaves = [*self.w.values(), *self.m.values(), *self.dense.values()]
        grads = torch.autograd.grad(loss, leaves)
        n = len(self.w)
        grad_w = dict(zip(self.w, grads[:n], strict=True))
        grad_m = dict(zip(self.m, grads[n : 2 * n], strict=True))
        if self.mask_gradient == "root":
            for name, w in self.w.items():
                if w.shape == self.m[name].shape:
                    grad_m[name] = grad_m[name] / w.detach().abs().sqrt()
        grad_dense = dict(zip(self.dense, grads[2 * n :], strict=True))
        # The cost of all connections, differentiated through the same proxy.
        total = sum((self.costs[k] * unit_step(m, self.proxy).sum() for k, m in self.m.items()))
        assert isinstance(total, Tensor)
        grad_cost = dict(
            zip(self.m, torch.autograd.grad(total, list(self.m.values())), strict=True)
        )
        self.time += 1
        move = self._adamw if self.adamw else self._sgd
        with torch.no_grad():
            for name, w in self.w.items():
                move(name, w, grad_w[name], self.weight_decay)
            for name, p in self.dense.items():
                decay = self.weight_decay if p.ndim > 1 else 0.0
                move(name, p, grad_dense[name], decay)
            for name, m in self.m.items():
                direction = self._normalised(name, grad_m) + self.lam * grad_cost[name]
                velocity = self.mask_momentum * self.mask_velocity[name] + direction
                moved = m - self.mask_lr * velocity
                if self.mask_restart:
                    revived = (m <= 0) & (moved > 0)
                    moved[revived], velocity[revived] = self.mask_restart, 0.0
                self.mask_velocity[name] = velocity
                m.copy_(moved)
        return float(loss.detach())

    def _normalised(self, name: str, grads: Mapping[str, Tensor]) -> Tensor:
        grad = grads[name]
        if self.normalize == "none":
            return grad
        if self.normalize == "network":
            return grad / (_rms(torch.cat([each.flatten() for each in grads.values()])) + EPSILON)
        single = all(grad[index].numel() == 1 for index in self.features[name])
        if self.normalize == "layer" or single:
            return grad / (_rms(grad) + EPSILON)
        variables = sum(each.numel() for each in grads.values())
        mean = variables / sum(len(indices) for indices in self.features.values())
        result = torch.full_like(grad, math.nan)
        for index in self.features[name]:
            divisor = _rms(grad[index])
            if self.normalize == "feature_norm":
                divisor = grad[index].square().sum().sqrt() / math.sqrt(mean)
            result[index] = grad[index] / (divisor + EPSILON)
        assert not result.isnan().any(), "a connection belongs to no feature"
        return result

    def _sgd(self, name: str, p: Tensor, grad: Tensor, weight_decay: float) -> None:
        grad = grad + weight_decay * p
        velocity = self.momentum * self.velocity[name] + grad
        self.velocity[name] = velocity
        p.sub_(self.lr * (grad + self.momentum * velocity if self.nesterov else velocity))

    def _adamw(self, name: str, p: Tensor, grad: Tensor, weight_decay: float) -> None:
        """Algorithm 2 of Loshchilov and Hutter, arXiv 1711.05101; `velocity` is its m."""
        beta1, beta2 = self.betas
        mean = beta1 * self.velocity[name] + (1 - beta1) * grad
        square = beta2 * self.squares[name] + (1 - beta2) * grad * grad
        self.velocity[name], self.squares[name] = mean, square
        mean_hat = mean / (1 - beta1**self.time)
        square_hat = square / (1 - beta2**self.time)
        step = mean_hat / (square_hat.sqrt() + self.eps) + weight_decay * p
        p.sub_(self.lr * step)


def _rms(values: Tensor) -> Tensor:
    return (values * values).mean().sqrt()
