"""ZeRO stage 3: a rank holds a stretch of each parameter, and gets whole ones layer by layer.

DeepSpeed cuts each flattened parameter into equal stretches, one a rank, of which the last are
padded. A rank's stretches of all parameters of a group lie in a row in one flat float32
tensor, a sub-group of DeepSpeed's, which is what the optimizer trains. Where a stretch lies is
DeepSpeed's own knowledge (`grad_position`, `ds_tensor`); what is read from it is checked against
the memory and the values of the parameters before anything trains on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.checkpoints.manifest import CheckpointError
from launcher.errors import RunError
from launcher.run.parameters import Parameters, Shards
from sclcore.optim.shards import Shard

if TYPE_CHECKING:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

# Elements that are whole at a time, and that travel at a time: an eighth of the network, at most
# 200 MB in float32. DeepSpeed's own 10⁹ would keep all of a network that is smaller than that.
_AT_A_TIME, _SHARE = 50_000_000, 8
# Smaller parameters than this share of the network stay whole: norms and biases, a few per cent of
# it in all, each of which would cost a message.
_SMALL = 10_000
_UNKNOWN = "its layout is not the one this version of scl knows; use a lower engine.zero_stage"


def settings(model: nn.Module) -> dict[str, int]:
    """What DeepSpeed shall keep whole of `model`, as keys of its `zero_optimization`."""
    size = sum(parameter.numel() for parameter in model.parameters())
    at_a_time = max(1, min(_AT_A_TIME, size // _SHARE))
    return {
        # SCL normalises over the network, in one step: one flat tensor of each parameter group.
        "sub_group_size": 2**62,
        "reduce_bucket_size": at_a_time,
        "stage3_prefetch_bucket_size": at_a_time,
        "stage3_max_live_parameters": at_a_time,
        "stage3_max_reuse_distance": at_a_time,
        "stage3_param_persistence_threshold": size // _SMALL,
    }


def stage_3_of(engine: Any) -> DeepSpeedZeroOptimizer_Stage3 | None:
    """DeepSpeed's optimizer of stage 3; None where the engine is in another."""
    # DeepSpeed chooses its accelerator when it is imported: not before the engine's module did.
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    wrapper = engine.optimizer
    return wrapper if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3) else None


@contextlib.contextmanager
def lent(zero: DeepSpeedZeroOptimizer_Stage3) -> Iterator[None]:
    """The time of an update, in which DeepSpeed hands the optimizer one group after the other.

    It takes all flat tensors away from the optimizer for that, and does not give them back.
    """
    for group in zero.optimizer.param_groups:
        group["params"] = []
    yield
    give_back(zero)


def give_back(zero: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Let the optimizer's groups hold their flat tensors, as in the stages below."""
    for number, flat in _numbered(zero):
        zero.optimizer.param_groups[number]["params"] = [flat]


def _numbered(zero: DeepSpeedZeroOptimizer_Stage3) -> Iterator[tuple[int, Tensor]]:
    """The number of each parameter group that is trained, with its flat tensor."""
    for place, flat in enumerate(zero.fp32_partitioned_groups_flat):
        yield zero.sub_group_to_group_id[place], flat


def _flat_shards(zero: DeepSpeedZeroOptimizer_Stage3, names: Mapping[int, str]) -> Shards:
    shards: Shards = [[] for _ in zero.optimizer.param_groups]
    for place, (number, flat) in enumerate(_numbered(zero)):
        if shards[number]:
            raise RunError(f"DeepSpeed cut parameter group {number} into several: {_UNKNOWN}")
        expected = 0
        for param in zero.fp16_groups[place]:
            sub_group, offset, size = zero.grad_position[zero.get_param_id(param)]
            start = dist.get_rank(zero.dp_process_group) * size
            length = max(0, min(size, param.ds_numel - start))
            shard = Shard(names[id(param)], tuple(param.ds_shape), start, length, offset)
            if (sub_group, offset) != (place, expected):
                raise RunError(
                    f"DeepSpeed's flat tensor has a gap or an overlap before {shard.name}: "
                    f"{_UNKNOWN}"
                )
            _verify(zero, place, shard, param, flat)
            # What is past the end of a parameter is nobody's, and DeepSpeed left it as it was.
            flat.data[offset + length : offset + size] = 0
            expected += size
            if length:
                shards[number].append(shard)
        if expected != flat.numel():
            raise RunError(
                f"DeepSpeed's flat tensor has {flat.numel()} elements, {expected} of them from "
                f"parameters: {_UNKNOWN}"
            )
    return shards


def _verify(
    zero: DeepSpeedZeroOptimizer_Stage3, place: int, shard: Shard, param: Any, flat: Tensor
) -> None:
    """By address in the flat tensor, and by value as DeepSpeed puts the parameter together."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    slices = zero.fp16_partitioned_groups_flat[place]
    address = slices.data_ptr() + shard.offset * slices.element_size()
    with GatheredParameters([param]):
        part = param.detach().flatten()[shard.start : shard.start + shard.length].clone()
    copy = flat.detach()[shard.offset : shard.offset + shard.length]
    if param.ds_tensor.data_ptr() != address or not torch.equal(part.to(copy.dtype), copy):
        raise RunError(
            f"DeepSpeed's slice of {shard.name} (elements {shard.start} to "
            f"{shard.start + shard.length}) does not hold the parameter's values: {_UNKNOWN}"
        )


class Stretches(Parameters):
    """The stretches that this rank holds of a network's parameters.

    Making one is collective. Raises RunError when they turn out not to be what DeepSpeed says.
    """

    are_whole = False

    def __init__(self, model: nn.Module, zero: DeepSpeedZeroOptimizer_Stage3) -> None:
        super().__init__(model)
        self._zero = zero
        self._params: dict[str, Any] = dict(model.named_parameters())
        give_back(zero)
        self.shards = _flat_shards(zero, self._names)
        self.ranks = zero.dp_process_group

    def own(self) -> dict[str, Tensor]:
        return {n: p.ds_tensor.data[: self._place(p)[1]] for n, p in self._params.items()}

    def take(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _cut(whole[name], *self._place(p)) for name, p in self._params.items()}

    def read(self, name: str, start: int, length: int) -> Tensor:
        param = self._params[name]
        first, held = self._place(param)
        if start < first or start + length > first + held:
            raise ValueError(f"{name}: this rank holds {first} to {first + held} of it")
        return param.ds_tensor.data[start - first : start - first + length]

    def changed(self) -> None:
        # Small ones stay whole from one update to the next: they must be put together anew.
        self._zero.parameter_offload.partition_all_parameters()

    def update(self) -> None:
        for place in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(place)
        self.changed()

    def gathered(self, own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        group = self._zero.dp_process_group
        main, ranks = dist.get_rank() == 0, dist.get_world_size(group)
        whole: dict[str, Tensor] = {}
        for name, values in own.items():
            param = self._params[name]
            # One after the other, to the CPU: no rank's accelerator has room for all of them.
            part = values.new_zeros(param.ds_tensor.numel())
            part[: len(values)] = values
            parts = [torch.empty_like(part) for _ in range(ranks)] if main else None
            dist.gather(part, parts, group=group)
            if parts is not None:
                flat = torch.cat([p.cpu() for p in parts])[: param.ds_numel]
                whole[name] = flat.view(param.ds_shape)
        return whole if main else None

    def load(self, state: Mapping[str, Tensor]) -> None:
        """As of whole ones, but of `state` only this rank's stretches are read.

        Raises CheckpointError where it is of another network.
        """
        own = self.own()
        mine = self.model.state_dict(keep_vars=True)
        shapes = {key: tuple(getattr(t, "ds_shape", t.shape)) for key, t in mine.items()}
        if shapes != {key: tuple(value.shape) for key, value in state.items()}:
            raise CheckpointError("the checkpoint holds the weights of another model")
        for key, tensor in mine.items():
            name = self._names.get(id(tensor))
            if name is None:
                tensor.copy_(state[key])
            else:
                own[name].copy_(_cut(state[key], *self._place(tensor)))
        self.changed()

    def _place(self, param: Any) -> tuple[int, int]:
        """(first element, number of elements) that this rank holds of a parameter."""
        size = param.ds_tensor.numel()
        start = dist.get_rank(self._zero.dp_process_group) * size
        return min(start, param.ds_numel), max(0, min(size, param.ds_numel - start))


def _cut(whole: Tensor, start: int, length: int) -> Tensor:
    return whole.reshape(-1)[start : start + length]
