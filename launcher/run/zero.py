"""DeepSpeed's flat slices → `Shard`s: which elements of which parameters a rank's optimizer holds.

ZeRO 1 and 2 replace the parameters of each group by one flat float32 tensor per rank, a slice of
all of them in a row. Where a slice comes from is DeepSpeed's own knowledge (`_hp_mapping`); what is
read from it is checked against the memory and the values of the parameters before anything trains
on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from launcher.errors import RunError
from launcher.run.parameters import Parameters, Shards
from sclcore.optim.shards import Shard

if TYPE_CHECKING:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


class Sliced(Parameters):
    """Parameters that every rank has whole, while the optimizer trains its slice of all of them.

    Raises RunError when DeepSpeed was configured in a way that leaves the slices unknown, or when
    they turn out not to be what it says.
    """

    def __init__(self, model: nn.Module, zero: DeepSpeedZeroOptimizer) -> None:
        super().__init__(model)
        self._zero = zero
        self.shards = _flat_shards(zero, self._names)
        self.ranks = zero.dp_process_group

    def update(self) -> None:
        self._zero.update_lp_params()


def _flat_shards(zero: DeepSpeedZeroOptimizer, names: dict[int, str]) -> Shards:
    if zero.round_robin_gradients:
        raise RunError(
            "DeepSpeed's round_robin_gradients reorders parameters without saying so in its map of "
            "slices: turn it off"
        )
    if zero.cpu_offload:
        raise RunError(
            "DeepSpeed's offload to the CPU is unsupported: SCL's state is updated where the "
            "gradients are; take a higher ZeRO stage or more ranks instead"
        )
    shards = []
    for number, params in enumerate(zero.bit16_groups):
        flat = zero.single_partition_of_fp32_groups[number]
        group = []
        for param in params:
            if shard := _shard(param, names[id(param)]):
                _verify(zero, number, shard, param, flat)
                group.append(shard)
        _verify_rest(group, flat, zero.groups_padding[number])
        shards.append(group)
    return shards


def _shard(param: Tensor, name: str) -> Shard | None:
    mapping: Any = param._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Shard(name, tuple(param.shape), ours.start, ours.numel, theirs.start)


def _verify(
    zero: DeepSpeedZeroOptimizer, number: int, shard: Shard, param: Tensor, flat: Tensor
) -> None:
    """By address: equal values alone would not tell two tensors of ones or zeros apart."""
    rank = torch.distributed.get_rank(zero.real_dp_process_group[number])
    slice_ = zero.parallel_partitioned_bit16_groups[number][rank]
    size = param.element_size()
    param_address = param.data_ptr() + shard.start * size
    slice_address = slice_.data_ptr() + shard.offset * size
    part = param.detach().flatten()[shard.start : shard.start + shard.length]
    copy = flat.detach()[shard.offset : shard.offset + shard.length]
    if param_address != slice_address or not torch.equal(part.to(copy.dtype), copy):
        raise RunError(
            f"DeepSpeed's slice of {shard.name} (elements {shard.start} to "
            f"{shard.start + shard.length}) does not hold the parameter's values: its layout is "
            "not the one this version of scl knows; use engine.zero_stage=0"
        )


def _verify_rest(shards: list[Shard], flat: Tensor, padding: int) -> None:
    """Every element of the flat tensor belongs to one shard, but for the padding at its end."""
    expected = 0
    for shard in sorted(shards, key=lambda shard: shard.offset):
        if shard.offset != expected:
            raise RunError(
                f"DeepSpeed's flat tensor has a gap or an overlap before {shard.name}: its layout "
                "is not the one this version of scl knows; use engine.zero_stage=0"
            )
        expected += shard.length
    if expected + padding != flat.numel():
        raise RunError(
            f"DeepSpeed's flat tensor has {flat.numel()} elements, {expected} of them from "
            f"parameters and {padding} of padding: its layout is not the one this version of scl "
            "knows; use engine.zero_stage=0"
        )
