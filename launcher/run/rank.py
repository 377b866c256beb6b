"""One rank of a run, from what was prepared to an exit code."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist
from tqdm.contrib.logging import logging_redirect_tqdm

from data.errors import DataError
from launcher.cluster import rendezvous
from launcher.cluster.process import name_rank
from launcher.cluster.ranks import from_main, places_by_host
from launcher.cluster.world import World
from launcher.errors import RunError, UserError, disk_refusal
from launcher.folder.lock import lock
from launcher.folder.provenance import write_origin, write_provenance
from launcher.run.build import build
from launcher.run.continued import begin
from launcher.run.engine import process_group
from launcher.run.loop import train
from launcher.run.prepare import Prepared
from launcher.terminal import Waiting, say

_OTHERS_END_WITHIN_S = 10


def run_rank(world: World, prepare: Callable[[], Prepared]) -> int:
    """Train as one rank; says what ended it.

    `prepare` reads and checks everything, or returns what a parent process has prepared.

    Exit codes: 0 done, 2 usage, 1 failed, 128 + n stopped by signal n.
    """
    is_prepared = False
    try:
        world.export()
        name_rank(world.rank)
        with logging_redirect_tqdm():
            world = rendezvous.begin(world)
            with _waiting("checking the data and the model", world):
                prepared = prepare()
            is_prepared = True
            return _train(prepared, world)
    except UserError as error:
        if world.is_main:
            say(f"error: {error}")
            rendezvous.turn_away(world, error)
        else:
            # Usually all ranks fail alike, rank 0 says why, and whoever started this one ends it
            # in its sleep. Where it fails alone, such as on a node without the data, rank 0 waits.
            refusal = None if is_prepared else rendezvous.refuse(world, error)
            time.sleep(_OTHERS_END_WITHIN_S)
            say(f"error: rank {world.rank}: {error}")
            if refusal is not None:
                refusal.join(rendezvous.REFUSES_WITHIN_S)
        return error.exit_code
    except Exception as error:
        if is_lost_connection(error):
            say(_lost_connection(world, str(error).splitlines()[0]))
            # Launchers report the rank they see end first, which must be the one that broke. It is
            # gone already, but a launcher that looks once a second could see this one before it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_OTHERS_END_WITHIN_S)
        else:
            say(f"error: rank {world.rank} failed:\n{traceback.format_exc()}")
        return 1


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because a peer is gone: an effect, never the first cause."""
    if isinstance(error, dist.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def _lost_connection(world: World, reason: str) -> str:
    if "imed out" not in reason:
        return f"rank {world.rank} ends because another rank did: {reason}"
    return (
        f"error: rank {world.rank} on {socket.gethostname()} waited for another longer than "
        f"engine.timeout_s, so that one or the network between is stopped or gone: {reason}"
    )


def _waiting(doing: str, world: World) -> contextlib.AbstractContextManager:
    """Rank 0 says now and then what is going on."""
    return Waiting(doing) if world.is_main else contextlib.nullcontext()


def _train(prepared: Prepared, world: World) -> int:
    recipe, manifest = prepared.inputs.recipe, prepared.inputs.manifest
    folder_lock = None
    try:
        folder_lock = lock(recipe.folder) if world.is_main else None
        with process_group(world, recipe.engine) as device:
            start, recipe, shift = from_main((prepared.start, recipe, prepared.inputs.shift))
            inputs = replace(prepared.inputs, recipe=recipe, shift=shift)
            inputs = inputs.dealt(start, places_by_host())
            if world.is_main:
                for line in begin(recipe, start) if start is not None else ():
                    say(line)
                write_provenance(recipe.folder, recipe, world)
            fresh = prepared.initial if start is None else None
            with _waiting("building the network on every rank", world):
                learner, course = build(inputs, world, device, fresh)
            if learner.initial_weights_hash is not None:
                write_origin(recipe.folder, learner.initial_weights_hash, manifest)
                for note in prepared.initial.notes:
                    say(note)
            return train(inputs, learner, course, start)
    except DataError as error:
        # No usage error: what is wrong with the data itself was refused before it was read.
        raise RunError(str(error)) from error
    except OSError as error:
        if refusal := disk_refusal(error):
            raise refusal from error
        raise
    finally:
        if folder_lock is not None:
            folder_lock.close()
