"""The latent state of SCL between steps: saved and loaded, asked, and changed by others.

Masks, latent weights and momenta are state of the optimizer; what holds them, whole tensors or
slices of flat ones, is found anew wherever that changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sclcore.held.holdings import Holdings
from sclcore.kernels.reference import live, write
from sclcore.layout.geometry import geometry_of
from sclcore.layout.local import begin_state, check_alike
from sclcore.optim.shards import Shard, check_shards
from sclcore.optim.sparse import SparseOptimizer
from sclcore.optim.written import LastWritten, say_lost
from sclcore.scl.chosen_masks import check_names, mask_variables_of, put
from sclcore.scl.exact import keep_best, prices_of
from sclcore.scl.guard import keep_layers_alive, leasts
from sclcore.scl.limit import Limit
from sclcore.scl.outside import take_over


class LatentState(SparseOptimizer):
    """What `SCL` is beside its step."""

    def _reset(self) -> None:
        super()._reset()
        self.connections_before: dict[str, int] = {}
        self.flips: dict[tuple[str, ...], Tensor] = {}
        self._process_group: dist.ProcessGroup | None = None
        self._held: Holdings | None = None
        self._skipping = False
        self._limit: Limit | None = None
        self.lowered: float | None = None
        self._written = LastWritten()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("skipped_steps", "grad_norm", "observing", "held_layers", "observations")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def _complete(self, group: dict[str, Any]) -> None:
        super()._complete(group)
        size = len(group["params"])
        group.setdefault("costs", [1.0] * size)
        group.setdefault("transposed_groups", [0] * size)
        group.setdefault("granularity", ["weight"] * size)
        group.setdefault("n_m", [None] * size)
        check_alike(group)
        for place, shape in enumerate(group["shapes"]):
            geometry_of(group, place, shape)

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Which shards a rank holds is the engine's to say, so it is no part of it."""
        self._take_over_touched()
        state = super().state_dict()
        for group in state["param_groups"]:
            group.pop("shards", None)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but latent state keeps its own precision where the parameter has less.

        The parameters themselves are set to w ⊙ H(m), so that model and masks always agree.
        Collective where state is sharded.
        """
        shards = [group.get("shards") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            # What was saved before there were restarts and roots goes on without them.
            group.setdefault("mask_restart", 0.0)
            group.setdefault("mask_gradient", "full")
        for group, own in zip(self.param_groups, shards, strict=True):
            if own is not None:
                group["shards"] = own
        saved = state_dict["state"]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(ids, params, strict=True):
            for key, value in saved.get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(p.device, copy=True)
        self.write_weights()

    @torch.no_grad()
    def write_weights(self) -> None:
        """Set every connection's parameter to w ⊙ H(m), after state was loaded or changed.

        Collective where state is sharded.
        """
        # Anew: what was counted before is no longer true.
        self._held = None
        held = self._hold()
        for piece, neighbours in zip(held.pieces, held.new_blocks(), strict=True):
            write(piece, live(piece, neighbours))
        self._written.note(held.params)

    @torch.no_grad()
    def read_weights(self) -> None:
        """Take the present values of the parameters over as the weights w; masks stay.

        Each step and `state_dict` do so on their own where PyTorch knows of a write, as after
        `model.load_state_dict`; it does not know of one through `p.data`. Collective where state
        is sharded.
        """
        held = self._hold()
        self._take_over(held, held.params)

    @torch.no_grad()
    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Choose masks by parameter name, whole tensors of the parameter's shape.

        A bool tensor says which connections live: their mask variables become `mask_init`, those of
        the dead its negative. A tensor of floats holds the mask variables themselves. The momentum
        of these masks starts from 0; tensors that are not named keep theirs. Parameters change at
        once, to w ⊙ H(m): before the first step w is what they hold, and later the latent weight,
        with which a dead connection comes back. From there on masks learn as ever, or stay as they
        are while `mask_lr` is 0. A layer that is left with fewer than `min_connections` gets its
        best ones back in the next step in which masks learn.

        To be called once the parameters are those that are trained on: after `fully_shard`, or an
        engine's set-up. Collective where state is sharded; all ranks give the same masks.

        Raises ValueError, and changes nothing, where a name, shape or type does not fit, or where
        granularity or N:M do not allow the masks.
        """
        check_names(masks, [*self.connection_sizes()])
        chosen: dict[str, Tensor] = {}
        owners: list[tuple[dict[str, Any], Tensor]] = []
        for group in [group for group in self.param_groups if group["connections"]]:
            for place, name in enumerate(group["names"]):
                if name in masks:
                    tensor = geometry_of(group, place, group["shapes"][place])
                    chosen[name] = mask_variables_of(masks[name], tensor, group["mask_init"])
                    owners.append((group, group["params"][0 if "shards" in group else place]))
        for group, param in owners:
            begin_state(group, param, self.state)
        held = self._hold()
        # No warning: which values are to be 0 is what is being chosen here.
        take_over(held, self._written.touched(held.params))
        put(held, chosen)
        self.write_weights()

    def limit_share(self, share: float | None, weights: Mapping[str, float] | None = None) -> None:
        """From the next step on, let no more than this share of the connections live (None: all).

        Each step that moves masks then ends by lowering all mask variables together, by as much as
        that takes and no more (`lowered`): instead of λ, which such steps do not apply. Of those
        that rise, only what still lives after it begins anew. `weights` is that of `keep_share`;
        a layer keeps its `min_connections` beyond it. Not part of `state_dict`.

        Raises ValueError with N:M, which decides the density itself.
        """
        if share is not None and any(tensor.n_m for tensor in self._hold().tensors):
            raise ValueError("limit_share cannot hold a share under N:M, which decides it itself")
        self._limit = None if share is None else Limit(share, weights)

    @torch.no_grad()
    def keep_share(self, share: float, weights: Mapping[str, float] | None = None) -> None:
        """Let exactly this share of the connections live: those with the highest mask variables.

        `weights` says what a connection of each tensor counts, by name (None: 1), and the share is
        of Σ weight · connections, met to within one connection. Each tensor keeps its
        `min_connections`. Parameters change at once, to w ⊙ H(m). Collective where state is
        sharded.

        Raises ValueError with N:M, which decides the density itself.
        """
        held = self._hold()
        if any(tensor.n_m for tensor in held.tensors):
            raise ValueError("keep_share cannot meet a share under N:M, which decides it itself")
        counted = weights or dict.fromkeys(held.names, 1.0)
        self.write_weights()
        held, spare = self._hold(), 0.0
        prices, budget = prices_of(held, share, counted)
        # What the guard gives back to layers that would be left with too little, others must lack.
        for _ in range(2):
            keep_best(held, prices, budget - spare)
            held.count_live()
            before = held.total_counts()
            keep_layers_alive(held, leasts(held))
            after = held.total_counts()
            gained = zip(held.names, before, after, strict=True)
            spare = sum(counted[name] * (now - was) for name, was, now in gained)
            if not spare:
                break
        self.write_weights()

    def _take_over(self, held: Holdings, params: Sequence[Tensor]) -> None:
        say_lost(take_over(held, params), self._warn)
        self._written.note(params)

    @torch.no_grad()
    def _take_over_touched(self) -> None:
        groups = [group for group in self.param_groups if group["connections"]]
        touched = self._written.touched(p for group in groups for p in group["params"])
        if not touched or self._held is None:
            return
        # Where state is sharded this is not collective: what has moved waits for the next step.
        if self._held.exchange is None or self._held.is_current(groups):
            self._take_over(self._hold(groups), touched)

    def set_shards(
        self, shards: Mapping[int, Sequence[Shard]], process_group: dist.ProcessGroup
    ) -> None:
        """Declare that groups have become one flat tensor each, of which ranks hold slices.

        `shards` says, for the number of a group, what lies where in this rank's flat tensor. Sums
        over features are completed over `process_group`. FSDP2 needs no such declaration.

        Raises ValueError when a shard fits neither the tensor it names nor the flat one.
        """
        for number, parts in shards.items():
            check_shards(self.param_groups[number], number, parts)
            self.param_groups[number]["shards"] = list(parts)
        self._process_group = process_group
        self._held = None

    def _hold(self, groups: Sequence[dict[str, Any]] | None = None) -> Holdings:
        """What this process holds of the groups of connections, made anew where that changed."""
        if groups is None:
            groups = [g for g in self.param_groups if g["connections"]]
        if self._held is None or not self._held.is_current(groups):
            self._held = Holdings(groups, self.state, self._process_group)
        return self._held

    def masks(self) -> dict[str, Tensor]:
        """Which connections are live: parameter name → bool tensor of the parameter's shape.

        Collective where state is sharded, and whole on every rank all the same.
        """
        held = self._hold()
        parts = [live(*both) for both in zip(held.pieces, held.new_blocks(), strict=True)]
        return held.gather(parts, torch.bool, missing=1)

    def mask_variables(self) -> dict[str, Tensor]:
        """The mask variables m by parameter name; empty before the first step.

        Collective and in new memory where state is sharded; else the state itself.
        """
        if self._hold().exchange is None:
            both = [*self._connections()]
            return {n: self.state[p]["mask"] for n, p in both if "mask" in self.state[p]}
        held = self._hold()
        gathered = held.gather([piece.mask for piece in held.pieces], held.dtype, missing=0)
        dtypes = [group["mask_dtype"] for group in held.owners]
        return {
            name: values.bfloat16() if dtype == "bfloat16" else values
            for (name, values), dtype in zip(gathered.items(), dtypes, strict=True)
        }

    def sample_mask_variables(self, count: int) -> Tensor:
        """About `count` mask variables, evenly spaced over each tensor, on the CPU in float32.

        Empty before the first step. The same on all ranks, and collective, where state is sharded.
        """
        held = self._hold()
        stride = max(1, sum(tensor.numel for tensor in held.tensors) // count)
        return held.sample([piece.mask for piece in held.pieces], stride).float().cpu()

    def live_connections(self) -> dict[str, int]:
        """How many connections of each tensor are live. Collective where state is sharded."""
        held = self._hold()
        # The state is everyone's to change between steps.
        held.count_live()
        return dict(zip(held.names, held.total_counts(), strict=True))

    def counted_connections(self) -> dict[str, int]:
        """`live_connections` as the last step counted them, at no cost: state changed by others
        since then is not seen. Collective where state is sharded.
        """
        held = self._hold()
        return dict(zip(held.names, held.total_counts(), strict=True))

    def take_flips(self) -> dict[str, tuple[int, int]]:
        """(flips, revivals) of each tensor's masks in all updates since this was last asked.

        A mask that changes twice counts twice. Collective where state is sharded.
        """
        taken: dict[str, tuple[int, int]] = {}
        exchange = self._hold().exchange
        for names, counts in self.flips.items():
            total = counts.clone()
            if exchange is not None:
                dist.all_reduce(total, group=exchange.group)
            taken |= {n: (f, r) for n, (f, r) in zip(names, total.tolist(), strict=True)}
            counts.zero_()
        return taken

    def _connections(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.param_groups:
            if group["connections"]:
                yield from zip(group["names"], group["params"], strict=True)
