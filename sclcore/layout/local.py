"""The pieces of parameter groups in this process: where they lie, and their state as it begins."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardedAlong

from sclcore.layout.geometry import Geometry
from sclcore.layout.piece import Piece, flat, is_dense, keeps_features_together
from sclcore.optim.settings import BUFFERS, buffers_of

_KEYS = ("weight", "mask", *BUFFERS.values(), "mask_momentum_buffer")

Group = dict[str, Any]
State = MutableMapping[Any, dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """Where a piece comes from: memory of `param`, from element `offset` of it on."""

    group: Group
    param: Tensor
    offset: int = 0


def check_alike(group: Group) -> None:
    """ValueError where a group mixes tensors that are sharded (DTensor) with whole ones.

    The same where they are sharded in a way that is none of FSDP2's over one dimension.
    """
    sharded = [isinstance(p, DTensor) for p in group["params"]]
    if any(sharded) and not all(sharded):
        names = group["names"]
        one, other = names[sharded.index(True)], names[sharded.index(False)]
        raise ValueError(
            f"a parameter group mixes sharded tensors ({one}) and whole ones ({other}): apply "
            "fully_shard to the whole model before connection_groups, or to none of it"
        )
    for name, param in zip(group["names"], group["params"], strict=True):
        if not isinstance(param, DTensor):
            continue
        dimensions, placements = param.device_mesh.ndim, param.placements
        if dimensions != 1 or placements != (ShardedAlong(0),):
            raise ValueError(
                f"{name} is distributed as {placements} over a mesh of {dimensions} dimension(s): "
                "SCL knows FSDP2's sharding along dimension 0 over one dimension"
            )


def find_pieces(
    group: Group, tensors: Sequence[Geometry], first: int, state: State
) -> Iterator[tuple[Piece, Source]]:
    """What this process holds of a group's tensors, with state, begun where there is none.

    `tensors` are the group's, numbered from `first` on. A whole tensor that has neither a gradient
    nor state yet is left out: it is not trained so far.
    """
    if "shards" in group:
        [param] = group["params"]
        values = _started(group, param, state, viewable=True)
        for shard in group["shards"]:
            if not shard.length:
                continue
            place, span = group["names"].index(shard.name), (shard.offset, shard.length)
            parts = {key: value.narrow(0, *span) for key, value in values.items()}
            piece = _piece(
                tensors[place], first + place, shard.start, param.narrow(0, *span), parts
            )
            yield piece, Source(group, param, shard.offset)
        return
    for place, (param, tensor) in enumerate(zip(group["params"], tensors, strict=True)):
        if param.grad is None and not state.get(param) and not isinstance(param, DTensor):
            continue
        local = _local(param.detach())
        values = _started(group, param, state, viewable=_is_viewable(local, tensor))
        values = {key: _local(value) for key, value in values.items()}
        piece = _piece(tensor, first + place, _start(param, tensor), local, values)
        yield piece, Source(group, param)


def _piece(
    tensor: Geometry, index: int, start: int, param: Tensor, values: dict[str, Tensor]
) -> Piece:
    viewable = _is_viewable(param, tensor)
    return Piece(
        tensor,
        index,
        start,
        param=flat(param) if viewable else torch.empty_like(param).contiguous().view(-1),
        target=None if viewable else param,
        weight=flat(values["weight"]),
        mask=flat(values["mask"]),
        mask_momentum=flat(values["mask_momentum_buffer"]),
        **{field: flat(values[key]) for field, key in BUFFERS.items() if key in values},
    )


def _started(group: Group, param: Tensor, state: State, *, viewable: bool) -> dict[str, Tensor]:
    """The state of a parameter, begun where there is none, laid out as its pieces need it.

    Tensors that were loaded may have another order in memory than the parameter has.
    """
    values = state[param]
    if "weight" not in values:
        dtype = torch.promote_types(param.dtype, torch.float32)
        values["weight"] = param.detach().to(dtype, copy=True)
        values["mask"] = _first_masks(group, param, values["weight"])
    for key in buffers_of(group):
        if key not in values:
            values[key] = torch.zeros_like(values["weight"])
    if "mask_momentum_buffer" not in values:
        values["mask_momentum_buffer"] = torch.zeros_like(values["mask"])
    keys = [k for k in _KEYS if k in values]
    wanted = _local(param) if viewable else _local(param).contiguous()
    for key in keys:
        if _local(values[key]).stride() != wanted.stride() and wanted.numel():
            laid_out = torch.empty_like(wanted, dtype=values[key].dtype)
            values[key] = laid_out.copy_(values[key])
    return {key: values[key] for key in keys}


def begin_state(group: Group, param: Tensor, state: State) -> None:
    """Begin the state of a parameter of which there is none, ahead of its first gradient."""
    _started(group, param, state, viewable=True)


def _first_masks(group: Group, param: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.bfloat16 if group["mask_dtype"] == "bfloat16" else weight.dtype
    mask = torch.full_like(weight, group["mask_init"], dtype=dtype)
    if any(group["n_m"]):
        # Of equals, the larger weights are the better start.
        shards = group.get("shards")
        if shards is None:
            if group["n_m"][_place(group, param)]:
                mask.add_(weight.abs())
        else:
            for shard in shards:
                if group["n_m"][group["names"].index(shard.name)]:
                    part = slice(shard.offset, shard.offset + shard.length)
                    mask[part] += weight[part].abs()
    return mask


def _place(group: Group, param: Tensor) -> int:
    return next(i for i, p in enumerate(group["params"]) if p is param)


def _is_viewable(param: Tensor, tensor: Geometry) -> bool:
    """Whether the memory of `param` can be seen flat with what belongs together lying together."""
    if param.is_contiguous():
        return True
    if tensor.block > 1 or tensor.transposed_groups or not keeps_features_together(param):
        return False
    return is_dense(param)


def gradient_of(piece: Piece, source: Source) -> Tensor | None:
    """The gradient of a piece, flat, in the order of the piece and the precision of its state."""
    grad = source.param.grad
    if grad is None:
        return None
    grad, param = _local(grad), _local(source.param)
    if "shards" in source.group:
        grad = grad.narrow(0, source.offset, piece.length)
    elif piece.target is not None:
        grad = grad.contiguous().view(-1)
    else:
        grad = flat(
            grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)
        )
    return grad.to(piece.weight.dtype)


def _local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, which is all of it unless it is a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _start(param: Tensor, tensor: Geometry) -> int:
    """The first element of this rank's part of a parameter."""
    if not isinstance(param, DTensor):
        return 0
    mesh = param.device_mesh
    rows = -(-tensor.shape[0] // mesh.size())
    return min(mesh.get_local_rank() * rows, tensor.shape[0]) * (tensor.numel // tensor.shape[0])


def memory_of(groups: Sequence[Group], state: State) -> Iterator[Any]:
    """Where everything is that the pieces are views of."""
    for group in groups:
        yield buffers_of(group)
        for param in group["params"]:
            values = state.get(param, {})
            yield bool(values) or param.grad is not None
            yield _local(param).data_ptr()
            yield from [_local(values[k]).data_ptr() for k in _KEYS if k in values]
