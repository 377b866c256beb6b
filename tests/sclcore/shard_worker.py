"""One rank of runs in sharded.py: `python -m tests.sclcore.shard_worker RANK STORE OUT RUN …`.

A RUN is CASE:KIND:RANKS.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.functional import pad

from sclcore.optim.shards import Shard
from tests.sclcore.sharded import CASES, Flat, Fsdp, batches, network, run

WORLD = 3
SESSIONS = {"flat": Flat, "fsdp": Fsdp}


def refusals(group: dist.ProcessGroup) -> dict[str, str]:
    """What each rank says of shards that the others' do not fit."""

    def shifted(shard: Shard, start: int, end: int) -> Shard:
        length = shard.length - start + end
        return dataclasses.replace(
            shard, start=shard.start + start, length=length, offset=shard.offset + start
        )

    # Rank 1 begins in up2, a tensor that rank 0 ends in.
    wrong = {"gap": (0, 3, 0), "overlap": (0, -3, 0), "short": (-1, 0, -2)}
    said = {}
    for name, (place, start, end) in wrong.items():
        session = Flat(CASES["usual"], network(CASES["usual"]), group)
        [flat] = session.optimizer.param_groups[0]["params"]
        shards = session.optimizer.param_groups[0]["shards"]
        if group.rank() == 1:
            # Room for a shard that begins earlier.
            session.optimizer.param_groups[0]["params"] = [pad(flat.detach(), (3, 0))]
            shards = [dataclasses.replace(s, offset=s.offset + 3) for s in shards]
            shards[place] = shifted(shards[place], start, end)
        session.optimizer.set_shards({0: shards}, group)
        try:
            session.optimizer.live_connections()
        except ValueError as error:
            said[name] = str(error)
    return said


def through_checkpoint_tools(group: dist.ProcessGroup) -> dict[str, Any]:
    """Save and load by torch.distributed.checkpoint's functions, which know FSDP2."""
    case = dataclasses.replace(CASES["feature"], steps=20)
    session = Fsdp(case, network(case), group)
    for batch in batches(case)[:10]:
        session.backward(batch, poisoned=False)
        session.step()
    whole = StateDictOptions(full_state_dict=True)
    model = get_model_state_dict(session.model, options=whole)
    saved = get_optimizer_state_dict(session.model, session.optimizer, options=whole)
    other = Fsdp(case, network(case), group)
    set_model_state_dict(other.model, model, options=whole)
    set_optimizer_state_dict(other.model, other.optimizer, saved, options=whole)
    hashes = []
    for pair in (session, other):
        for batch in batches(case)[10:]:
            pair.backward(batch, poisoned=False)
            pair.step()
        hashes.append(pair.optimizer.mask_hash())
    return {
        "names": [*map(str, saved["state"])],
        "hashes": hashes,
        "parameters": [session.parameters(), other.parameters()],
    }


def main() -> None:
    rank = int(sys.argv[1])
    store, out = sys.argv[2:4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    groups = {n: dist.new_group(list(range(n))) for n in range(1, WORLD + 1)}
    for wanted in sys.argv[4:]:
        name, kind, size = wanted.split(":")
        if rank < int(size):
            case, group = CASES[name], groups[int(size)]
            assert isinstance(group, dist.ProcessGroup)
            result = run(SESSIONS[kind](case, network(case), group))
            torch.save(result, f"{out}.{name}.{kind}.{size}.{rank}")
    if rank < 2:
        group = groups[2]
        assert isinstance(group, dist.ProcessGroup)
        torch.save(refusals(group), f"{out}.refusals.flat.2.{rank}")
        torch.save(through_checkpoint_tools(group), f"{out}.checkpoint.fsdp.2.{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
