"""Trainings that are run with whole state and with sharded state, to be compared.

`Flat` does with an optimizer what DeepSpeed's ZeRO does, without DeepSpeed; `Fsdp` is FSDP2.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import avg_pool2d, mse_loss, pad, silu

from sclcore import SCL, connection_groups
from sclcore.optim.shards import Shard

GLOBAL_BATCH = 12  # divides by 1, 2 and 3
STEPS = 100


class Crossed(nn.Module):
    """717 connections of every kind, which equal slices cut in the midst of features and kernels.

    Smooth throughout: at a kink, rounding would send two correct runs different ways. Input
    [batch, 2, 4, 4]. `dense` is meant to be excluded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 7, 3, padding=1)
        self.depth = nn.Conv2d(7, 7, 3, padding=1, groups=7)
        self.up = nn.ConvTranspose2d(7, 6, 2, stride=2)
        self.up2 = nn.ConvTranspose2d(6, 4, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(16, 12)
        self.out = nn.Linear(12, 5)
        self.dense = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = silu(self.depth(silu(self.conv(x))))
        x = self.norm(silu(self.up2(silu(self.up(x)))))
        x = silu(self.head(avg_pool2d(x, 4).flatten(1)))
        return self.dense(silu(self.out(x)))


class Wide(nn.Module):
    """A Linear of 32 × `features` and one back: only the number of its features is of interest."""

    features = 33

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, self.features)
        self.second = nn.Linear(self.features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(silu(self.first(x.flatten(1))))


class Wider(Wide):
    features = 333


# First elements of the connection tensors of `Crossed` in a row.
STARTS = {"conv": 0, "depth": 126, "up": 189, "up2": 357, "head": 465, "out": 657}


class Tiny(nn.Module):
    """Two connections: fewer than ranks, so that some rank has none."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x[:, :, 0, 0]).expand(-1, 3)


@dataclass(frozen=True)
class Case:
    """One training. `cuts` are where the flat tensor of connections is cut, None: equal slices."""

    options: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    worlds: tuple[int, ...] = (2, 3)
    dtype: torch.dtype = torch.float64
    steps: int = STEPS
    network: type[nn.Module] = Crossed
    cuts: tuple[int, ...] | None = None
    costs: tuple[float, ...] | None = None
    split: bool = False
    """Two groups of connections instead of one."""
    blank: bool = False
    """Inputs of 0: the first layer gets no gradient, so all its mask variables stay equal."""
    same_data: bool = False
    """Every rank computes the whole gradient, which thereby has the same bits as with one."""
    lam_from: tuple[int, float] | None = None
    """From this step on, λ is this."""
    poison: tuple[int, int] | None = None
    """(step, rank): where a gradient is not finite."""
    fsdp: bool = False
    """Under FSDP2 as well."""
    resume_at: int | None = None
    """The step after which everything is saved and continued with an optimizer made anew."""
    meddle_at: int | None = None
    """The step after which masks are chosen and weights written from outside."""
    limit: float | None = None
    """From step 20 on, no more than this share of the connections lives."""
    keep_at: int | None = None
    """The step after which exactly 40 % of the connections are kept."""


MOVING = {
    "lr": 0.05,
    "lam": 0.1,
    "weight_decay": 1e-3,
    "normalize": "feature",
    "mask_lr": 0.02,
    "mask_momentum": 0.8,
    "mask_restart": 0.1,
}
ADAMW = {**MOVING, "weight_rule": "adamw", "betas": (0.9, 0.95), "lr": 0.01, "weight_decay": 0.05}
# λ and steps in units of the mask gradient, which is about 1e-4 here where it is not normalised.
RAW = {
    "normalize": "none",
    "lam": 2e-5,
    "mask_lr": 2.0,
    "mask_init": 0.02,
    "mask_restart": 0.01,
}
COARSE = {"conv": "kernel", "depth": "kernel", "up": "kernel", "up2": "kernel", "head": "feature"}
TWO_OF_FOUR = {"head": "2:4", "out": "2:4"}
# Rank 1 of 3 holds two elements in the midst of a row, of an N:M block and of a unit.
SLIVER = (STARTS["head"] + 21, STARTS["head"] + 23)

CASES: dict[str, Case] = {
    "feature": Case(MOVING, worlds=(1, 2, 3), resume_at=50, fsdp=True),
    "layer": Case({**MOVING, "normalize": "layer", "nesterov": True}),
    "network": Case({**MOVING, "normalize": "network"}, worlds=(1, 2, 3), fsdp=True),
    "feature-norm": Case({**MOVING, "normalize": "feature_norm", "mask_restart": 0.0}),
    "none": Case({**MOVING, **RAW, "momentum": 0.0}),
    "leaky": Case({**MOVING, "proxy": "leaky_relu"}),
    "float32": Case(MOVING, dtype=torch.float32),
    "two-groups": Case(MOVING, split=True),
    "coarse": Case(MOVING, {"granularity": COARSE}, fsdp=True),
    "coarse-layer": Case(
        {**MOVING, "normalize": "layer", "proxy": "softplus"},
        {"granularity": {"*": "feature", "up*": "kernel"}},
    ),
    "n-m": Case(MOVING, {"n_m": TWO_OF_FOUR}, resume_at=50, fsdp=True),
    "n-m-sliver": Case(MOVING, {"n_m": TWO_OF_FOUR}, worlds=(3,), cuts=SLIVER),
    "coarse-sliver": Case(MOVING, {"granularity": COARSE}, worlds=(3,), cuts=SLIVER),
    "kernel-sliver": Case(MOVING, {"granularity": COARSE}, worlds=(3,), cuts=(360, 364)),
    "bf16": Case(
        {**MOVING, "mask_dtype": "bfloat16"},
        {"granularity": COARSE | {"head": "weight"}, "n_m": TWO_OF_FOUR},
        resume_at=50,
        fsdp=True,
    ),
    # Element by element, so not a bit may differ from the unsharded run, even in float32.
    "bf16-exact": Case(
        {**MOVING, **RAW, "mask_dtype": "bfloat16"},
        dtype=torch.float32,
        same_data=True,
    ),
    "guard": Case({**MOVING, "lam": 30.0, "min_connections": 5}, steps=30, fsdp=True),
    "guard-coarse": Case(
        {**MOVING, "lam": 30.0, "min_connections": 20, "mask_dtype": "bfloat16"},
        {"granularity": COARSE},
        steps=30,
    ),
    "guard-n-m": Case(
        {**MOVING, "lam": 30.0, "min_connections": 90},
        {"n_m": TWO_OF_FOUR},
        steps=30,
        worlds=(3,),
        cuts=SLIVER,
    ),
    "guard-ties": Case(
        {**MOVING, "lam": 30.0, "min_connections": 64},
        steps=30,
        blank=True,
        worlds=(3,),
        cuts=(40, 100),
    ),
    # What λ has set in motion goes on when it falls: the last step that leads below 0 begins where
    # the λ of the time could not have led there.
    "guard-momentum": Case(
        {**MOVING, "lam": 30.0, "mask_lr": 0.01, "mask_momentum": 0.9, "mask_init": 20.6},
        steps=30,
        blank=True,
        costs=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        lam_from=(10, 0.0),
    ),
    "meddled": Case(MOVING, {"n_m": TWO_OF_FOUR}, steps=40, worlds=(3,), fsdp=True, meddle_at=15),
    "kept": Case(
        {**MOVING, "normalize": "network", "min_connections": 4},
        {"granularity": COARSE},
        steps=30,
        worlds=(3,),
        cuts=SLIVER,
        fsdp=True,
        keep_at=25,
    ),
    "limited": Case(
        {**MOVING, "normalize": "network", "mask_gradient": "root"},
        {"granularity": {"up*": "kernel"}},
        worlds=(1, 2, 3),
        limit=0.3,
        resume_at=50,
    ),
    # The first layer's mask variables are all equal: the first of them stay, on whichever rank.
    "kept-equals": Case(MOVING, steps=8, worlds=(3,), blank=True, keep_at=6),
    "poison": Case(MOVING, steps=12, poison=(5, 1), fsdp=True),
    "adamw": Case(ADAMW, resume_at=50, fsdp=True),
    "adamw-float32": Case({**ADAMW, "eps": 1e-3}, dtype=torch.float32, worlds=(3,), steps=20),
    "adamw-poison": Case(ADAMW, steps=12, poison=(5, 1), worlds=(2,)),
    # Mask variables far from 0, as they mostly are: nothing to guard.
    "usual": Case({**MOVING, "mask_lr": 1e-3}, steps=20, fsdp=True),
    "narrow": Case({**MOVING, "mask_lr": 1e-3}, steps=5, network=Wide),
    "broad": Case({**MOVING, "mask_lr": 1e-3}, steps=5, network=Wider),
    "tiny": Case({**MOVING, "lam": 0.5}, network=Tiny, worlds=(3,), fsdp=True),
}


def batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(case.steps, GLOBAL_BATCH, 2, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.sin(2 * x.sum((2, 3, 4))[..., None] + torch.arange(3.0, dtype=torch.float64))
    x = x * (not case.blank)
    return [(a.to(case.dtype), b.to(case.dtype)) for a, b in zip(x, y, strict=True)]


def network(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.network().to(case.dtype)


def optimizer_for(model: nn.Module, case: Case) -> SCL:
    exclude = ["dense"] if isinstance(model, Crossed) else []
    groups = connection_groups(model, exclude=exclude, **case.groups)
    if case.costs is not None:
        groups[0]["costs"] = list(case.costs)
    if case.split:
        lists = ("params", "costs", "transposed_groups", "granularity", "n_m")
        whole = groups[0]
        second = {**whole, **{key: whole[key][3:] for key in lists}, "lam": 0.2}
        groups[:1] = [{**whole, **{key: whole[key][:3] for key in lists}}, second]
    return SCL(groups, **case.options)


class Whole:
    """One process, as anyone trains: the reference."""

    def __init__(self, case: Case, model: nn.Module, ranks: dist.ProcessGroup | None) -> None:
        self.case, self.model, self.ranks = case, model, ranks
        self.rank, self.world = (ranks.rank(), ranks.size()) if ranks is not None else (0, 1)
        self.optimizer = optimizer_for(model, case)

    def backward(self, batch: tuple[Tensor, Tensor], poisoned: bool) -> None:
        """G of this rank's share of the global batch, averaged over the ranks."""
        share = GLOBAL_BATCH if self.case.same_data else GLOBAL_BATCH // self.world
        mine = slice(None) if self.case.same_data else slice(self.rank * share, None)
        x, y = (part[mine][:share] for part in batch)
        self.optimizer.zero_grad()
        mse_loss(self.model(x), y).backward()
        if poisoned:
            self.poison()

    def poison(self) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        for grad in grads:
            grad.view(-1)[0] = math.nan

    def step(self) -> None:
        self.optimizer.step()

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def meddle(self) -> None:
        """What a loop of one's own may do between two steps."""
        generator = torch.Generator().manual_seed(6)
        names = [*self.optimizer.connection_sizes()][1:]
        shapes = {n: m.shape for n, m in self.optimizer.masks().items()}
        self.optimizer.set_masks({n: torch.randn(shapes[n], generator=generator) for n in names})
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.mul_(0.5)

    def keep(self) -> None:
        self.optimizer.keep_share(0.4)

    def renew(self) -> None:
        """Go on with an optimizer made anew from the saved state."""
        saved = self.optimizer.state_dict()
        self.optimizer = optimizer_for(self.model, self.case)
        self.optimizer.load_state_dict(saved)


class Flat(Whole):
    """ZeRO: of each group, every rank has a slice of all its tensors in a row."""

    def __init__(self, case: Case, model: nn.Module, ranks: dist.ProcessGroup) -> None:
        super().__init__(case, model, ranks)
        self._flatten()

    def _flatten(self) -> None:
        self.tensors = [group["params"] for group in self.optimizer.param_groups]
        self.spans = [self._slice(number) for number in range(len(self.tensors))]
        names = {id(p): name for name, p in self.model.named_parameters()}
        shards = {}
        for number, (group, tensors) in enumerate(
            zip(self.optimizer.param_groups, self.tensors, strict=True)
        ):
            first, length = self.spans[number]
            row = self._row(number, [p.detach() for p in tensors])
            group["params"] = [nn.Parameter(row[first : first + length].clone())]
            if group["connections"]:
                shards[number] = [*_shards(tensors, names, first, length)]
        assert self.ranks is not None
        self.optimizer.set_shards(shards, self.ranks)

    def _slice(self, number: int) -> tuple[int, int]:
        """(first element, length) of this rank's slice, padding included."""
        size = sum(p.numel() for p in self.tensors[number])
        if self.case.cuts is not None and number == 0:
            bounds = [0, *self.case.cuts, size]
            return bounds[self.rank], bounds[self.rank + 1] - bounds[self.rank]
        # As DeepSpeed aligns them for NCCL.
        aligned = -(-size // (2 * self.world)) * 2 * self.world
        length = aligned // self.world
        return self.rank * length, length

    def _row(self, number: int, values: Sequence[Tensor]) -> Tensor:
        row = torch.cat([value.reshape(-1) for value in values])
        first, length = self.spans[number]
        return pad(row, (0, max(0, first + length - len(row))))

    def step(self) -> None:
        """One group at a time and with nothing else in `param_groups`, as DeepSpeed does it."""
        groups = self.optimizer.param_groups
        for number, group in enumerate(groups):
            first, length = self.spans[number]
            grads = [
                torch.zeros_like(p) if p.grad is None else p.grad for p in self.tensors[number]
            ]
            row = self._row(number, grads)
            group["params"][0].grad = row[first : first + length].clone()
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            self.optimizer.param_groups = groups
            group["params"][0].grad = None
        self._gather()

    def backward(self, batch: tuple[Tensor, Tensor], poisoned: bool) -> None:
        for p in self.model.parameters():
            p.grad = None
        super().backward(batch, poisoned=False)
        if not self.case.same_data:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            bucket = torch.cat([grad.view(-1) for grad in grads]) / self.world
            _all_reduce(bucket, group=self.ranks)
            for grad, mean in zip(grads, bucket.split([g.numel() for g in grads]), strict=True):
                grad.copy_(mean.view(grad.shape))
        if poisoned:
            self.poison()

    def meddle(self) -> None:
        super().meddle()
        self._gather()

    def keep(self) -> None:
        super().keep()
        self._gather()

    def _gather(self) -> None:
        rows = []
        for number, tensors in enumerate(self.tensors):
            first, length = self.spans[number]
            [flat] = self.optimizer.param_groups[number]["params"]
            size = sum(p.numel() for p in tensors)
            row = flat.new_zeros(size + 2 * self.world, requires_grad=False)
            row[first : first + length] = flat.detach()
            rows.append(row[:size])
        whole = torch.cat(rows)
        _all_reduce(whole, group=self.ranks)
        params = [p for tensors in self.tensors for p in tensors]
        for p, values in zip(params, whole.split([p.numel() for p in params]), strict=True):
            p.detach().copy_(values.view(p.shape))

    def renew(self) -> None:
        saved = self.optimizer.state_dict()
        self.optimizer = optimizer_for(self.model, self.case)
        self._flatten()
        self.optimizer.load_state_dict(saved)


def _shards(
    tensors: Sequence[Tensor], names: dict[int, str], first: int, length: int
) -> Iterator[Shard]:
    at = 0
    for p in tensors:
        low, high = max(at, first), min(at + p.numel(), first + length)
        if low < high:
            yield Shard(names[id(p)], tuple(p.shape), low - at, high - low, low - first)
        at += p.numel()


class Fsdp(Whole):
    """FSDP2 in a plain PyTorch loop: the optimizer notices by itself."""

    def __init__(self, case: Case, model: nn.Module, ranks: dist.ProcessGroup) -> None:
        mesh = DeviceMesh.from_group(ranks, "cpu")
        if isinstance(model, Crossed):
            for part in (model.conv, model.up, model.head):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        super().__init__(case, model, ranks)

    def poison(self) -> None:
        for p in self.model.parameters():
            if isinstance(p.grad, DTensor) and p.grad.to_local().numel():
                p.grad.to_local().view(-1)[0] = math.nan

    def parameters(self) -> dict[str, Tensor]:
        whole = {}
        for name, p in self.model.named_parameters():
            assert isinstance(p, DTensor), name
            value: Any = p.detach()
            whole[name] = value.full_tensor()
        return whole


_all_reduce = dist.all_reduce


@contextlib.contextmanager
def _counting(messages: list[int]) -> Iterator[None]:
    """Note the size of every all-reduce, and −1 for what no step should need."""

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        messages.append(tensor.numel())
        return _all_reduce(tensor, *args, **kwargs)

    gather = dist.all_gather_object

    def all_gather_object(*args: Any, **kwargs: Any) -> Any:
        messages.append(-1)
        return gather(*args, **kwargs)

    with (
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(dist, "all_gather_object", all_gather_object),
    ):
        yield


def run(session: Whole) -> dict[str, Any]:
    """Train; what every rank of a run, and a run without ranks, must agree on."""
    case, optimizer = session.case, session.optimizer
    found: dict[str, list[Any]] = {
        key: []
        for key in ("hashes", "live", "held", "messages", "seen", "norms", "before", "flips")
    }
    for index, batch in enumerate(batches(case)):
        optimizer = session.optimizer
        if case.limit and index >= 20:
            optimizer.limit_share(case.limit)
        if case.lam_from and index >= case.lam_from[0]:
            for group in optimizer.param_groups:
                group["lam"] = case.lam_from[1]
        poisoned = case.poison is not None and case.poison[0] == index
        session.backward(batch, poisoned and session.rank == case.poison[1] % session.world)  # type: ignore[index]
        optimizer.observing = index % 10 == 4
        messages: list[int] = []
        with _counting(messages):
            session.step()
        found["messages"].append(messages)
        if index % 5 == 0:
            found["live"].append([*optimizer.live_connections().values()])
        found["held"].append(list(optimizer.held_layers))
        found["norms"].append(optimizer.grad_norm)
        found["before"].append([*optimizer.connections_before.values()])
        if index % 10 == 0 or case.steps < STEPS:
            found["hashes"].append(optimizer.mask_hash())
        if optimizer.observing:
            seen = optimizer.observations
            found["seen"].append({n: dict(vars(seen[n])) for n in sorted(seen)})
            found["flips"].append(optimizer.take_flips())
        if case.resume_at == index:
            session.renew()
        if case.meddle_at == index:
            session.meddle()
        if case.keep_at == index:
            session.keep()
    optimizer = session.optimizer
    return {
        **found,
        "parameters": session.parameters(),
        "masks": optimizer.masks(),
        "mask_variables": {n: m.detach().clone() for n, m in optimizer.mask_variables().items()},
        "sample": optimizer.sample_mask_variables(100),
        "skipped": optimizer.skipped_steps,
        "updates": [group["updates"] for group in optimizer.param_groups],
    }


def kinds_of(case: Case) -> Iterator[tuple[str, int]]:
    """(how the state is sharded, number of ranks) of all runs of a case."""
    yield from itertools.product(("flat", "fsdp") if case.fsdp else ("flat",), case.worlds)


# What no other case of a hundred steps shows with state that is cut: these are of the first tier.
FIRST_TIER = {
    *("feature", "layer", "network", "coarse", "n-m", "bf16", "bf16-exact", "limited", "adamw"),
}


def is_long(name: str, kind: str, world: int) -> bool:
    """Whether a run is of the second tier: a hundred steps of what another run shows as well."""
    if CASES[name].steps < STEPS:
        return False
    return world < 3 or name not in FIRST_TIER or (kind == "fsdp" and name != "feature")


ALL_RUNS = [(name, *run) for name, case in CASES.items() for run in kinds_of(case)]
