"""SCL as an optimizer: the masks, the latent weights and their momenta are optimizer state.

The module's parameter is the effective weight v = w ⊙ H(m), zeros included, so the model stays
plain PyTorch and `p.grad` is G = ∂L/∂v. Whatever averages G over ranks (DDP, DeepSpeed) has thereby
averaged both gradients exactly, since w and m are the same everywhere:

    ∂L/∂w = G ⊙ H(m)          ∂L/∂m = G ⊙ w ⊙ φ'(m)

and normalisation, which is not linear, comes after that average. Source: Tang et al.,
"Automatic Sparse Connectivity Learning for Neural Networks", arXiv 2201.05020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from sclcore.held.holdings import Holdings
from sclcore.kernels.reference import FLIPS, NO_CUTS, live
from sclcore.optim.rules import step_dense, total_norm
from sclcore.optim.settings import settings_of
from sclcore.scl.guard import keep_layers_alive, leasts_of_moved
from sclcore.scl.latent import LatentState
from sclcore.scl.limit import lower
from sclcore.scl.observe import observe
from sclcore.scl.settings import check_group
from sclcore.scl.step import first_pass, normalisers, options_of, second_pass


class SCL(LatentState):
    """Sparse Connectivity Learning, with SGD or AdamW for the weights.

        optimizer = SCL(connection_groups(model), lr=0.1, lam=0.1)

    Works in a plain loop and under DDP as any optimizer does. Groups with `connections: True` (made
    by `connection_groups`) learn their masks, and there must be one; the others stay dense and are
    trained by the same rule of the weights.

    The weights: `lr` is their learning rate. `weight_rule` is `sgd`, with classical `momentum`
    (0.9, without dampening) and `nesterov`, or `adamw`, with `betas` (0.9 and 0.999) and `eps`
    (1e-8); what a rule has no use for is refused. `weight_decay` is L2 decay of the latent weights
    w and of dense parameters, decoupled under AdamW.

    The masks: `lam` is λ, the cost of one connection, in units of the normalised mask gradient,
    whose rms over the network is 1. `mask_lr` is the learning rate of the mask variables; 0 freezes
    them. They have a momentum of their own, `mask_momentum`, so a steady gradient of 1 moves them
    by `mask_lr / (1 - mask_momentum)` per step. All begin at `mask_init`, and one that rises above
    0 begins anew at `mask_restart`, its momentum 0 (with a `mask_restart` of 0 it goes on from
    where it is). `normalize` says what the mask gradient is divided by: its rms over the `network`
    (all connections that are stepped together), over the `layer` or the output `feature` (the
    paper), its 2-norm over the feature (`feature_norm`, by the root of the mean number of mask
    variables of a feature, so that λ keeps its scale), or 1 (`none`). `mask_gradient` says what G
    counts by there: the weight (`full`, as the chain rule has it), or the root of its size with its
    sign (`root`), such that a connection which began small is not cut before it could grow; where
    several weights share a mask variable, always the weight. `proxy` names the derivative
    that stands in for that of the unit step (`sclcore.kernels.proxies`). Each layer keeps at least
    `min_connections`, the best-scored ones. `mask_dtype` is the precision of m and its momentum:
    `bfloat16` saves 4 bytes per weight and rounds at random, so that small steps count on average.

    State per connection tensor, all of the tensor's shape: `weight` (w), `mask` (m),
    `momentum_buffer` (AdamW: `exp_avg`, `exp_avg_sq`; each group counts its `updates`),
    `mask_momentum_buffer`; in float32 where the parameter has less (double stays
    double). Where `granularity` is coarser than a weight, all elements of a unit have the same m.

    Under FSDP2 the state is sharded like the parameters, and under ZeRO like its flat tensors
    (`set_shards`); each step then has two small all-reduces, and `masks`, `mask_variables`,
    `live_connections`, `take_flips`, `mask_hash` and steps with `observing` are collective.

    A step whose gradient is not finite changes nothing and is counted in `skipped_steps`.
    After each step `grad_norm` holds the 2-norm of G over all parameters, and `held_layers` the
    names of the layers that `min_connections` kept from dying in that step, and `lowered` how far
    all mask variables fell for `limit_share`. Where state is sharded,
    `connections_before` has the live connections of each tensor when that step began. `flips` holds
    what this process counted since `take_flips` was last called: [tensors, 2], flips and revivals,
    by the names of the tensors. An engine may step the groups one by one, in their order: all
    follow what became of the connections' step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        lam: float,
        *,
        mask_lr: float = 1e-3,
        momentum: float | None = None,
        mask_momentum: float = 0.9,
        mask_restart: float = 1.0,
        nesterov: bool | None = None,
        weight_decay: float = 0.0,
        mask_gradient: str = "full",
        proxy: str = "identity",
        normalize: str = "network",
        mask_init: float = 1.0,
        min_connections: int = 1,
        mask_dtype: str = "float32",
        weight_rule: str = "sgd",
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
    ) -> None:
        own = locals()
        settings = {name: own[name] for name in SETTINGS}
        params = params if isinstance(params, Tensor) else [*params]
        given = {"momentum": momentum, "nesterov": nesterov, "betas": betas, "eps": eps}
        rule = settings_of(given, params, weight_rule)
        super().__init__(params, {**settings, **rule, "connections": False, "updates": 0})

    def _validate(self, group: dict[str, Any]) -> None:
        check_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update. `closure` may re-evaluate the model and return the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if any(g.is_sparse for g in grads):
            raise RuntimeError("SCL does not support sparse gradients (an Embedding's, say)")
        # An engine that steps the groups one by one may leave those empty whose turn it is not.
        groups = [group for group in self.param_groups if group["params"]]
        connections = [group for group in groups if group["connections"]]
        if connections:
            # Not those of other groups: an engine may step them one by one.
            stepped = {name for group in connections for name in group["names"]}
            self.held_layers = [name for name in self.held_layers if name not in stepped]
            self._skipping = bool(grads) and not self._step_connections(connections)
        if grads and not self._skipping:
            for group in self.param_groups:
                if not group["connections"]:
                    step_dense(group, self.state)
        return loss

    def _step_connections(self, groups: list[dict[str, Any]]) -> bool:
        """The update of everything with masks; False if the gradient of any rank is not finite."""
        held = self._hold(groups)
        if touched := self._written.touched(held.params):
            self._take_over(held, touched)
        grads, settings = held.gradients(), options_of(held)
        norm = total_norm(self.param_groups)
        if held.exchange is None and not self._accept(float(norm)):
            return False
        limit = self._limit if any(group["mask_lr"] for group in groups) else None
        before = [live(piece) for piece in held.pieces] if limit else []
        own = settings
        if limit:
            settings = [replace(each, price=0.0, mask_restart=0.0) for each in settings]
        sums, units = first_pass(held, grads, settings)
        layer_sums = held.layer_sums(sums)
        cuts = [NO_CUTS] * len(held.pieces)
        if held.exchange is not None:
            known = held.exchange.complete(sums, layer_sums, units, held.counts, norm.square())
            if not self._accept(math.sqrt(known.total)):
                return False
            sums, layer_sums, cuts = known.sums, known.layer_sums, known.cuts
            self.connections_before |= zip(held.names, known.live, strict=True)
        rms, divisors = normalisers(held, sums, layer_sums)
        second_pass(held, grads, settings, divisors, cuts)
        if limit:
            self.lowered = lower(held, limit, before, own, self.lowered)
        self._add_flips(held)
        for group in groups:
            group["updates"] += 1
        self.held_layers += keep_layers_alive(held, leasts_of_moved(held))
        self._written.note(held.params)
        if self.observing:
            others = {n: o for n, o in self.observations.items() if n not in held.names}
            self.observations = others | observe(held, rms, divisors)
        return True

    def _accept(self, grad_norm: float) -> bool:
        self.grad_norm = grad_norm
        self.skipped_steps += not math.isfinite(grad_norm)
        return math.isfinite(grad_norm)

    def _add_flips(self, held: Holdings) -> None:
        counts = held.counts[:, FLIPS:]
        so_far = self.flips.get(names := tuple(held.names))
        self.flips[names] = counts.clone() if so_far is None else so_far.add_(counts)


SETTINGS = tuple(signature(SCL.__init__).parameters)[2:]
"""What a parameter group of SCL may set: all but `self` and `params`."""
